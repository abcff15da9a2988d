"""Projector training: the loss against plain loops, the recipe, determinism, resuming, and what is refused."""

import hashlib
import importlib.util
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from oracle import naive_merge

from samer import evaluation
from samer.config import InputError, MergeConfig, ObjectsConfig, dump_config, load_config
from samer.data import flickr
from samer.features.write import write_features
from samer.index.verify import verify
from samer.retrievers.hf import Retriever
from samer.retrievers.projectors import load_projector
from samer.training import checks
from samer.training import loop as training_loop
from samer.training import model as training_model
from samer.training.batches import CaptionDataset, Collator
from samer.training.loop import train
from samer.training.model import ProjectorModel


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Training takes a GPU where there is one; bytes are compared here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture(scope="module")
def settings(base, world):
    """A config for the small world; words are overrides, `.` written as `__`."""

    def make(output, **changes):
        values = {
            "model__name": base,
            "data__root": world,
            "merge__num_regions": 12,
            "train__output_dir": output,
            "train__bf16": "false",
            "train__train_batch_size": 8,
            "train__grad_accum_steps": 1,
            "train__num_train_epochs": 1,
            "train__learning_rate": 5e-3,
            "train__dataloader_num_workers": 0,
            "train__logging_steps": 1,
            "data__eval_split": "",
            **changes,
        }
        return load_config(None, [f"{key.replace('__', '.')}={value}" for key, value in values.items()])

    return make


@pytest.fixture
def captured(monkeypatch):
    """What one call of `train` works with: the retriever, the module, every batch, a hash of the frozen weights."""
    seen = SimpleNamespace(batches=[], retriever=None, model=None, before=None)
    load = training_loop.open_encoder

    def loading(*words, **more):
        seen.retriever = load(*words, **more)
        seen.before = fingerprint(seen.retriever)
        return seen.retriever

    class Model(ProjectorModel):
        def __init__(self, *words):
            super().__init__(*words)
            seen.model = self

    class Recorder(Collator):
        def __call__(self, rows):
            seen.batches.append(super().__call__(rows))
            return seen.batches[-1]

    monkeypatch.setattr(training_loop, "open_encoder", loading)
    monkeypatch.setattr(training_loop, "ProjectorModel", Model)
    monkeypatch.setattr(training_loop, "Collator", Recorder)
    return seen


def fingerprint(retriever):
    """A hash of every bit of the frozen model: parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(retriever.model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    for name, tensor in sorted(retriever.model.named_buffers()):
        digest.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def weights(output):
    return (output / "projector.safetensors").read_bytes()


def history(output, name="loss"):
    entries = json.loads((output / "history.json").read_text(), parse_constant=pytest.fail)
    return {entry["step"]: entry[name] for entry in entries if name in entry}


def stop_before(step, monkeypatch):
    """Makes the next run end as if the user had interrupted it when `step` begins."""

    take = training_loop.Run.step

    def stopping(run, *words):
        if run.state.step + 1 == step:
            raise KeyboardInterrupt
        return take(run, *words)

    monkeypatch.setattr(training_loop.Run, "step", stopping)


# --- the loss -------------------------------------------------------------------------------------------------------


def naive_mixed(merged, numbers, share):
    """Every row's vectors mixed with the most similar ones of the next image of the batch."""
    order = sorted(set(numbers))
    mixed = []
    for own, number in zip(merged, numbers):
        following = order[(order.index(number) + 1) % len(order)]
        other = merged[numbers.index(following)]
        rows = []
        for vector in own:
            best = max(range(len(other)), key=lambda k: float((vector @ other[k]).detach()))
            between = share * vector + (1 - share) * other[best]
            rows.append(between / between.norm())
        mixed.append(torch.stack(rows))
    return mixed


def naive_loss(retriever, batch, weight, bias, merge, temperature, share=None):
    """METHOD sections 1-4 as loops over captions; the frozen part is transformers' own."""
    with torch.no_grad():
        image_hidden = retriever.model.vlm(**batch["image_inputs"], use_cache=False).last_hidden_state
        query_hidden = retriever.model.vlm(**batch["query_inputs"], use_cache=False).last_hidden_state

    def unit(hidden):
        projected = hidden @ weight.T + bias
        return projected / projected.norm(dim=-1, keepdim=True)

    grid = torch.tensor([(x / 7, y / 7) for y in range(8) for x in range(8)] + [(0.5, 0.5)] * 6)
    count = len(batch["image_of"])
    merged = []
    for row in range(count):
        tokens = unit(image_hidden[batch["image_of"][row]])
        merged.append(naive_merge(tokens, grid, merge, batch["labels"][row])[0])
    if share is not None:
        merged = naive_mixed(merged, batch["image_numbers"].tolist(), share)
    losses = []
    for row in range(count):
        query = unit(query_hidden[row][batch["query_inputs"]["attention_mask"][row].bool()])
        scores = [sum((image @ token).max() for token in query) / len(query) for image in merged]
        shares = [torch.exp((score - 1) / temperature) for score in scores]  # the same factor above and below
        own = [share for k, share in enumerate(shares) if batch["image_numbers"][k] == batch["image_numbers"][row]]
        losses.append(-torch.log(sum(own) / sum(shares)))
    return sum(losses) / count


@pytest.mark.parametrize("share", [None, 0.6])
@pytest.mark.parametrize(
    "merge",
    [
        MergeConfig(num_regions=12),
        MergeConfig(num_regions=5, spatial_weight=0.5, object_penalty=2.0, cluster_iters=2),
        MergeConfig(num_regions=5, center_init="farthest", assignment_temperature=0.2),
    ],
)
def test_loss_and_gradient_equal_plain_loops(retriever, world, merge, share):
    records = flickr.load_split(world, "train", boxes=True)
    rows = CaptionDataset(records).rows
    batch = Collator(retriever, ObjectsConfig())([rows[k] for k in (0, 7, 2, 21, 8, 36)])
    assert batch["image_numbers"].tolist() == [0, 1, 0, 4, 1, 7]
    assert batch["labels"].max() >= 2
    assert not batch["query_inputs"]["attention_mask"].all()
    model = ProjectorModel(retriever, merge, 0.07, True)
    model.mixup_share = share
    loss = model(**batch)["loss"]
    loss.backward()
    layer = model.projection
    weight, bias = (t.detach().clone().requires_grad_() for t in (layer.weight, layer.bias))
    expected = naive_loss(retriever, batch, weight, bias, merge, 0.07, share)
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(layer.weight.grad, weight.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.bias.grad, bias.grad, atol=1e-5, rtol=1e-4)
    assert weight.grad.abs().max() > 1e-2


def test_labels_change_the_loss_and_boxes_do_not_reach_evaluation(retriever, world):
    records = flickr.load_split(world, "train", boxes=True)
    batch = Collator(retriever, ObjectsConfig())(CaptionDataset(records).rows[:20])
    model = ProjectorModel(retriever, MergeConfig(num_regions=12), 0.07, True)
    blank = {**batch, "labels": torch.zeros_like(batch["labels"])}
    assert (model(**batch)["loss"] - model(**blank)["loss"]).abs() > 1e-4
    with_boxes = evaluation.evaluate_records(retriever, records[:4], model.merge, batch_size=4)
    without = evaluation.evaluate_records(
        retriever, flickr.load_split(world, "train", boxes=False)[:4], model.merge, batch_size=4
    )
    assert with_boxes == without


# --- the recipe -----------------------------------------------------------------------------------------------------


def test_only_the_projector_trains_and_the_loss_falls(settings, captured, tmp_path, world):
    result = train(settings(tmp_path / "run", train__num_train_epochs=4))
    assert result.steps == 4 * 8
    model, retriever = captured.model, captured.retriever
    assert fingerprint(retriever) == captured.before
    assert {name for name, _ in model.named_parameters()} == {
        "projection.weight",
        "projection.bias",
    }
    assert sum(p.numel() for p in model.parameters()) == 16 * 32 + 16
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in retriever.model.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in retriever.projection.parameters())
    assert torch.equal(retriever.current_projector().weight, retriever.base_projector.weight)

    saved = load_projector(tmp_path / "run", retriever)
    assert torch.equal(saved.weight, model.projection.weight)
    assert torch.equal(saved.bias, model.projection.bias)
    records = flickr.load_split(world, "train", boxes=True)
    batch = Collator(retriever, ObjectsConfig())(CaptionDataset(records).rows)  # the whole training set
    fresh = ProjectorModel(retriever, MergeConfig(num_regions=12), 0.07, True)
    with torch.no_grad():
        assert model(**batch)["loss"] < 0.95 * fresh(**batch)["loss"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_equals_a_plain_loop_of_the_recipe(settings, captured, tmp_path, accumulate):
    """AdamW, warm-up and cosine, clipping, the gradient of the mean over a step's captions; no other state."""
    config = settings(
        tmp_path / "run",
        train__train_batch_size=4,
        train__grad_accum_steps=accumulate,
        train__weight_decay=0.3,
        train__max_grad_norm=8,
        train__warmup_ratio=0.25,
        data__limit_train_images=8,
    )
    train(config)
    batches = captured.batches
    assert [len(batch["image_of"]) for batch in batches] == [4] * 10
    steps = 10 // accumulate
    model = ProjectorModel(captured.retriever, config.merge, 0.07, True)
    layer = model.projection
    optimizer = torch.optim.AdamW(
        [{"params": [layer.weight], "weight_decay": 0.3}, {"params": [layer.bias], "weight_decay": 0.0}], lr=5e-3
    )
    warm = math.ceil(0.25 * steps)
    rates, norms = [], []
    for step in range(steps):
        after = (step - warm) / (steps - warm)
        rates.append(5e-3 * (step / warm if step < warm else 0.5 * (1 + math.cos(math.pi * after))))
        for group in optimizer.param_groups:
            group["lr"] = rates[-1]
        optimizer.zero_grad()
        gradients, losses = [], []
        for batch in batches[step * accumulate : (step + 1) * accumulate]:
            loss = model(**batch)["loss"]
            gradients.append(torch.autograd.grad(loss, [layer.weight, layer.bias]))
            losses.append(loss.item())
        layer.weight.grad, layer.bias.grad = (sum(parts) / accumulate for parts in zip(*gradients))
        norm = torch.cat([layer.weight.grad.flatten(), layer.bias.grad]).norm()
        assert history(tmp_path / "run", "grad_norm")[step + 1] == pytest.approx(float(norm), rel=1e-4)
        assert history(tmp_path / "run")[step + 1] == pytest.approx(sum(losses) / accumulate, rel=1e-5)
        norms.append(float(norm))
        for tensor in (layer.weight, layer.bias):
            tensor.grad *= min(1, 8 / norm)
        optimizer.step()
    assert min(norms) < 7.5 < 10 < max(norms)  # some gradients are clipped, some are not: Adam undoes a constant factor
    assert list(history(tmp_path / "run", "learning_rate").values()) == pytest.approx(rates)
    saved = load_projector(tmp_path / "run", captured.retriever)
    torch.testing.assert_close(saved.weight, layer.weight.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(saved.bias, layer.bias.detach(), atol=1e-5, rtol=0)
    assert (saved.weight - captured.retriever.base_projector.weight).abs().max() > 1e-3


def test_a_short_last_step_is_the_mean_over_its_captions(settings, captured, tmp_path, monkeypatch):
    """Not over its batches: the same captions give the same step, however many processes share them."""
    losses = []
    forward = ProjectorModel.forward

    def recording(self, *words, **inputs):
        result = forward(self, *words, **inputs)
        losses.append(result["loss"].item())
        return result

    monkeypatch.setattr(ProjectorModel, "forward", recording)
    train(
        settings(
            tmp_path / "run",
            train__train_batch_size=6,
            train__grad_accum_steps=4,
            data__limit_train_images=8,
        )
    )
    assert [len(batch["image_of"]) for batch in captured.batches] == [6] * 6 + [4]
    assert history(tmp_path / "run") == {
        1: pytest.approx(sum(losses[:4]) / 4),
        2: pytest.approx((6 * losses[4] + 6 * losses[5] + 4 * losses[6]) / 16),
    }


def test_every_caption_is_seen_once_an_epoch(settings, captured, tmp_path):
    train(settings(tmp_path / "run", train__num_train_epochs=2))
    numbers = [batch["image_numbers"] for batch in captured.batches]
    assert len(numbers) == 16
    epochs = [torch.cat(numbers[:8]).tolist(), torch.cat(numbers[8:]).tolist()]
    for epoch in epochs:
        assert sorted(epoch) == [image for image in range(12) for _ in range(5)]
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1]  # shuffled anew


def test_bf16_runs_on_the_cpu(settings, captured, tmp_path, base):
    train(settings(tmp_path / "run", train__bf16="true", train__num_train_epochs=0.25))
    assert captured.retriever.model.vlm.dtype == torch.bfloat16
    assert captured.model.projection.weight.dtype == torch.float32
    full = Retriever.load(str(base))  # a projector trained on half-precision features belongs to the same base
    saved = load_projector(tmp_path / "run", full)
    assert torch.isfinite(saved.weight).all()
    assert not torch.equal(saved.weight, full.base_projector.weight)


def test_diagnostics_are_logged_and_the_history_stays_json(settings, tmp_path):
    """Without any box there is no object mass to measure; JSON knows no NaN."""
    for name, least in (("boxes", 0.005), ("none", 1.0)):
        train(settings(tmp_path / name, objects__min_area=least, train__num_train_epochs=0.5, train__logging_steps=2))
        assert list(history(tmp_path / name, "entropy")) == [2, 4]
    assert all(0 < share < 1 for share in history(tmp_path / "boxes", "object_mass_on_own").values())
    assert history(tmp_path / "none", "object_mass_on_own") == {}


def test_alignment_and_uniformity_are_logged(settings, captured, tmp_path):
    """Of the pooled vectors of the first step, as the projection was before it, by loops over pairs."""
    train(settings(tmp_path / "run", train__num_train_epochs=0.1))
    retriever, batch = captured.retriever, captured.batches[0]
    unit = torch.nn.functional.normalize
    queries = retriever.encode_queries(batch["query_inputs"])
    means = [unit(tokens[mask].mean(0), dim=0) for tokens, mask in zip(queries.tokens, queries.mask)]
    visual, images = retriever.encode_images(batch["image_inputs"]), []
    grid = torch.tensor([(x / 7, y / 7) for y in range(8) for x in range(8)] + [(0.5, 0.5)] * 6)
    for image, labels in zip(batch["image_of"], batch["labels"]):
        merged = naive_merge(visual.tokens[image], grid, MergeConfig(num_regions=12), labels)[0]
        images.append(unit(merged.mean(0), dim=0))
    numbers = batch["image_numbers"].tolist()
    near = [
        float((query - image).square().sum())
        for query, own in zip(means, numbers)
        for image, number in zip(images, numbers)
        if own == number
    ]
    firsts = [images[numbers.index(number)] for number in sorted(set(numbers))]
    spread = [math.exp(-2 * float((a - b).square().sum())) for k, a in enumerate(firsts) for b in firsts[:k]]
    assert history(tmp_path / "run", "alignment")[1] == pytest.approx(sum(near) / len(near), abs=1e-5)
    assert history(tmp_path / "run", "uniformity")[1] == pytest.approx(math.log(sum(spread) / len(spread)), abs=1e-5)


def test_mixup_goes_from_an_image_to_the_midpoint(settings, tmp_path):
    train(settings(tmp_path / "run", train__mixup="midpoint"))
    found = history(tmp_path / "run", "mixup_share")
    assert found == {step: pytest.approx(0.75 + 0.25 * math.cos(math.pi * (step - 1) / 8)) for step in range(1, 9)}
    train(settings(tmp_path / "plain"))
    assert history(tmp_path / "plain", "mixup_share") == {}
    ours, plain = history(tmp_path / "run"), history(tmp_path / "plain")
    assert ours[1] == pytest.approx(plain[1], abs=1e-6)  # of the images alone
    assert abs(ours[8] - plain[8]) > 1e-2


def test_a_run_with_mixup_that_is_interrupted_goes_on_to_the_same_bytes(settings, tmp_path, monkeypatch):
    changes = {"train__mixup": "midpoint", "train__save_steps": 2, "train__num_train_epochs": 0.75}
    train(settings(tmp_path / "whole", **changes))
    with monkeypatch.context() as patch:
        stop_before(6, patch)
        with pytest.raises(KeyboardInterrupt):
            train(settings(tmp_path / "run", **changes))
    train(settings(tmp_path / "run", **changes))
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert history(tmp_path / "run", "mixup_share") == history(tmp_path / "whole", "mixup_share")


def test_validation_is_that_of_the_saved_projector(settings, tmp_path, world, retriever):
    config = settings(tmp_path / "run", data__eval_split="val", data__limit_eval_images=5, train__num_train_epochs=2)
    result = train(config)
    records = flickr.load_split(world, "val", boxes=False, limit_images=5)
    untouched = evaluation.evaluate_records(retriever, records, config.merge, batch_size=7)
    retriever.use_projector(load_projector(tmp_path / "run", retriever))
    expected = evaluation.evaluate_records(retriever, records, config.merge, batch_size=7)
    assert set(result.validation) >= {"r@1", "r@5", "r@10", "ndcg@10"}
    assert result.validation == pytest.approx(expected)
    assert expected != untouched
    assert list(history(tmp_path / "run", "eval_r@1")) == [8, 16]  # after each epoch
    again = train(config)
    assert again.validation == result.validation


def test_a_run_without_validation(settings, tmp_path):
    result = train(settings(tmp_path / "run", train__num_train_epochs=0.25))
    assert result.validation == {}
    assert result.output_dir == tmp_path / "run"


def test_the_script_writes_what_belongs_together(settings, script, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(dump_config(settings(tmp_path / "run", train__num_train_epochs=0.25)))
    result = script("train").main(["--config", str(tmp_path / "config.yaml"), "merge.num_regions=9"])
    assert result.steps == 2
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert written == {"projector.safetensors", "config.json", "config.yaml", "history.json", "checkpoint-2"}
    assert json.loads((tmp_path / "run/config.json").read_text())["merge"]["num_regions"] == 9
    assert load_config(tmp_path / "run/config.yaml").merge.num_regions == 9
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("training 528 parameters of")
    assert lines[-1].startswith("done: 2 steps")
    inside = {path.name for path in (tmp_path / "run/checkpoint-2").iterdir()}
    assert inside == {"projector.safetensors", "config.json", "state.safetensors", "state.json", "checksums.json"}


# --- determinism and resuming ---------------------------------------------------------------------------------------


SAVED = {"train__num_train_epochs": 2, "train__save_steps": 2, "data__limit_train_images": 8}  # 5 batches an epoch


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """Runs of two epochs that nobody interrupted, by accumulation steps."""
    folder = tmp_path_factory.mktemp("whole")
    runs = {}

    def run(accumulate):
        if accumulate not in runs:
            output = folder / str(accumulate)
            train(settings(output, **SAVED, train__grad_accum_steps=accumulate))
            runs[accumulate] = output
        return runs[accumulate]

    return run


def test_one_seed_gives_the_same_bytes(settings, whole, tmp_path):
    train(settings(tmp_path / "again", **SAVED))
    train(settings(tmp_path / "other", **SAVED, train__seed=1))
    assert weights(tmp_path / "again") == weights(whole(1))
    assert history(tmp_path / "again") == history(whole(1))
    assert weights(tmp_path / "other") != weights(whole(1))


@pytest.mark.parametrize(("accumulate", "stop"), [(1, 4), (1, 9), (2, 3), (2, 5)])
def test_an_interrupted_run_goes_on_to_the_same_bytes(settings, whole, tmp_path, accumulate, stop, capsys):
    changes = {**SAVED, "train__grad_accum_steps": accumulate}
    expected = whole(accumulate)
    output = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_before(stop, patch)
        with pytest.raises(KeyboardInterrupt):
            train(settings(output, **changes))
    assert not (output / "projector.safetensors").exists()
    last = (stop - 1) // 2 * 2
    assert (output / f"checkpoint-{last}").is_dir()
    torn = output / "checkpoint-99"  # as a process killed while it wrote leaves it
    torn.mkdir()
    (torn / "state.safetensors").write_bytes(b"half")
    (output / "checkpoint-last").mkdir()
    capsys.readouterr()
    train(settings(output, **changes))
    assert f"resuming from {output / f'checkpoint-{last}'}" in capsys.readouterr().out.splitlines()
    assert weights(output) == weights(expected)
    assert history(output) == history(expected)


def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(settings, whole, tmp_path):
    changes = {**SAVED, "train__grad_accum_steps": 1}
    output = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_before(6, patch)
        with pytest.raises(KeyboardInterrupt):
            train(settings(output, **changes))
    last = output / "checkpoint-4"
    assert verify(output).damages == []
    files = json.loads((last / "checksums.json").read_text())
    assert {file.name for file in last.iterdir()} - files.keys() == {"checksums.json", "state.json"}
    for name in files:
        data = (last / name).read_bytes()
        (last / name).write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
        with pytest.raises(InputError, match=f"{last / name}: contents differ .* to go on from the one before"):
            train(settings(output, **changes))
        assert [line.split(": ")[0] for line in verify(output).damages] == [str(last / name)]
        (last / name).write_bytes(data)
    state = (last / "state.json").read_text()
    flipped = state.replace('"epoch": 0', '"epoch": 1')
    cases = (("checksums.json", "{"), ("state.json", '{"step": 4}'), ("state.json", flipped))
    for name, text in (*cases, ("state.json", None), ("state.safetensors", None)):
        data = (last / name).read_bytes()
        (last / name).unlink() if text is None else (last / name).write_text(text)
        with pytest.raises(InputError, match=str(last / name)):
            train(settings(output, **changes))
        (last / name).write_bytes(data)
    (last / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match=f"{last} is no checkpoint of this run"):  # we write nothing of that name
        train(settings(output, **changes))
    (last / "pytorch_model.bin").unlink()
    for name in ("checksums.json", "state.safetensors"):
        (last / name).unlink()  # as a removal that was killed leaves it
    train(settings(output, **changes))
    assert weights(output) == weights(whole(1))


def test_what_the_trainer_of_transformers_wrote_is_refused_unless_it_is_finished(settings, tmp_path):
    """As SaMer left a folder before it had a loop of its own."""
    changes = {"train__num_train_epochs": 0.25}
    output, result = tmp_path / "run", train(settings(tmp_path / "run", **changes))
    shutil.rmtree(output / "checkpoint-2")
    old = output / "checkpoint-1"
    old.mkdir()
    for name in ("trainer_state.json", "optimizer.pt", "model.safetensors", "checksums.json"):
        (old / name).write_text("{}")
    assert train(settings(output, **changes)).steps == result.steps  # finished: it is left as it is
    (output / "history.json").unlink()
    before = sorted(output.rglob("*"))
    words = (
        rf"{old}: an earlier SaMer wrote this .*another train\.output_dir, or remove {output}/checkpoint-\* to start"
    )
    with pytest.raises(InputError, match=words):
        train(settings(output, **changes))
    (old / "checksums.json").unlink()  # torn
    with pytest.raises(InputError, match=words):
        train(settings(output, **changes))
    assert [path for path in before if path.name != "checksums.json"] == sorted(output.rglob("*"))


@pytest.mark.parametrize("text", ["", "[]", "{}", "[1]", '[{"loss": 1}]'])
def test_a_damaged_history_is_named(settings, tmp_path, text):
    changes = {"train__num_train_epochs": 0.25}
    train(settings(tmp_path / "run", **changes))
    path = tmp_path / "run" / "history.json"
    before = path.read_bytes()
    path.write_text(text)
    with pytest.raises(
        InputError, match=f"{path}: not readable .*remove it and run the same command again to end this run"
    ):
        train(settings(tmp_path / "run", **changes))
    path.unlink()
    train(settings(tmp_path / "run", **changes))
    assert path.read_bytes() == before


def test_a_finished_run_is_left_as_it_is(settings, tmp_path):
    config = settings(tmp_path / "run", data__eval_split="val", train__save_steps=6)
    first = train(config)
    before = weights(tmp_path / "run"), history(tmp_path / "run"), history(tmp_path / "run", "eval_r@1")
    second = train(config)
    assert (first.steps, first.validation) == (second.steps, second.validation)
    assert (weights(tmp_path / "run"), history(tmp_path / "run"), history(tmp_path / "run", "eval_r@1")) == before


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("merge__num_regions", 13),
        ("merge__center_init", "farthest"),
        ("objects__max_phrases", 3),
        ("data__limit_train_images", 5),
        ("model__name", "elsewhere"),
        ("train__learning_rate", 1e-3),
        ("train__train_batch_size", 4),
        ("train__seed", 1),
        ("train__gather_negatives", "false"),
    ],
)
def test_a_folder_of_a_run_with_other_settings_is_refused(settings, tmp_path, key, value):
    output = tmp_path / "run"
    output.mkdir()
    (output / "config.yaml").write_text(dump_config(settings(output)))
    with pytest.raises(InputError, match=f"{output} holds a run with {key.replace('__', '.')}="):
        train(settings(output, **{key: value}))
    assert [path.name for path in output.iterdir()] == ["config.yaml"]


def test_settings_that_change_no_result_may_change(settings, tmp_path):
    output = tmp_path / "run"
    changes = {"train__num_train_epochs": 0.25}
    train(settings(output, **changes))
    before = weights(output)
    train(settings(output, **changes, train__run_name="other", train__eval_batch_size=3))
    assert weights(output) == before


def test_other_numbers_of_processes_keep_the_captions_of_a_step_or_are_refused(settings, tmp_path, monkeypatch, capsys):
    """The run: one process that accumulates 6 batches of 2."""
    output = tmp_path / "run"
    changes = {"train__train_batch_size": 2, "train__num_train_epochs": 0.2}
    train(settings(output, **changes, train__grad_accum_steps=6))
    capsys.readouterr()
    for processes, accumulate in ((2, 3), (3, 2), (6, 1)):
        monkeypatch.setattr(checks, "world_size", lambda count=processes: count)
        for configured in (6, accumulate):  # as the run began, or as it is now
            config = settings(output, **changes, train__grad_accum_steps=configured)
            checks.check_output(output, config)
            assert checks.find_start(output, config.train).accumulation == accumulate
            said = f"1 processes x 2 captions x 6 accumulated so far, {processes} x 2 x {accumulate} from here on"
            assert said in capsys.readouterr().out
        with pytest.raises(InputError, match=r"train\.grad_accum_steps=6, now 5"):
            checks.check_output(output, settings(output, **changes, train__grad_accum_steps=5))
    monkeypatch.setattr(checks, "world_size", lambda: 4)
    words = "each step has 12 captions .* 4 processes take a multiple of 8; use 1 or 2 or 3 or 6 processes"
    with pytest.raises(InputError, match=words):
        checks.find_start(output, settings(output, **changes, train__grad_accum_steps=6).train)


def test_resume_false_is_refused_where_a_run_is(settings, tmp_path):
    output = tmp_path / "run"
    changes = {"train__num_train_epochs": 0.125, "train__resume": "false"}
    train(settings(output, **changes))  # nothing there: it runs
    with pytest.raises(InputError, match=r"train\.resume is false"):
        train(settings(output, **changes))


def test_a_loss_that_is_not_finite_stops_with_its_step(settings, tmp_path, monkeypatch):
    calls = []
    loss = training_model.multi_positive_t2i_loss

    def breaking(*words):
        calls.append(words)
        return loss(*words) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(training_model, "multi_positive_t2i_loss", breaking)
    with pytest.raises(InputError, match="the loss is nan at step 3"):
        train(settings(tmp_path / "run"))
    assert not (tmp_path / "run/projector.safetensors").exists()


def missing_reporter():
    return next(name for name in ("comet_ml", "clearml", "dvclive", "wandb") if not importlib.util.find_spec(name))


@pytest.mark.parametrize("name", ["no_such_thing", missing_reporter()])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_reports_to_what_is_not_there_are_refused_at_once(settings, tmp_path, name):
    with pytest.raises(InputError, match=r"train\.report_to: .*(not supported|installed)"):
        train(settings(tmp_path / "run", train__report_to=name, model__name="not even looked for"))
    assert not (tmp_path / "run").exists()


class Recorder(GeneralTracker):
    """A tracker that keeps what it is told."""

    name, requires_logging_directory = "recorder", False

    def __init__(self, broken=False):
        super().__init__(_blank=True)
        self.logged, self.settings, self.broken = [], {}, broken

    def start(self):
        if self.broken:
            raise RuntimeError("no login")

    tracker = property(lambda self: self)

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None, **more):
        self.logged.append({**values, "step": step})

    def finish(self):
        self.logged.append("finished")


def test_a_tracker_hears_settings_and_every_log(settings, tmp_path, monkeypatch):
    tracker = Recorder()
    monkeypatch.setattr(training_loop, "check_trackers", lambda names: [tracker])
    train(settings(tmp_path / "run", data__eval_split="val", train__num_train_epochs=0.5, train__logging_steps=2))
    entries = json.loads((tmp_path / "run/history.json").read_text())[:-1]
    assert [{k: v for k, v in entry.items() if k != "epoch"} for entry in entries] == tracker.logged[:-1]
    assert [entry["step"] for entry in tracker.logged[:-1]] == [2, 4, 4]
    assert tracker.logged[-1] == "finished"
    assert tracker.settings["merge.num_regions"] == 12
    monkeypatch.setattr(training_loop, "check_trackers", lambda names: [Recorder(broken=True)])
    with pytest.raises(InputError, match=r"train\.report_to=.* can't be started \(no login\)"):
        train(settings(tmp_path / "other"))


def test_a_store_without_the_validation_split_is_refused_before_the_first_step(settings, tmp_path, base, world):
    store = tmp_path / "store"
    write_features(store, world, ["train"], Retriever.load(str(base)), dtype="float32")
    changes = {"data__features": store, "train__num_train_epochs": 0.25}
    with pytest.raises(InputError, match=rf"{store}: no features of .*it holds the splits train: run"):
        train(settings(tmp_path / "run", **changes, data__eval_split="val"))
    assert not (tmp_path / "run").exists()
    train(settings(tmp_path / "run", **changes))


def test_data_and_model_are_named_when_they_are_missing(settings, tmp_path):
    for change, words in [
        ({"data__root": ""}, "data.root is not set"),
        ({"data__root": tmp_path / "nowhere"}, "nowhere: not a folder"),
        ({"data__train_split": "tiny"}, "no split 'tiny'"),
        ({"model__name": tmp_path / "nothing"}, "nothing' can't be loaded"),
    ]:
        with pytest.raises(InputError, match=words):
            train(settings(tmp_path / "run", **change))
        assert not (tmp_path / "run").exists()


def test_several_gpus_without_torchrun_do_not_split_the_batch(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = training_loop._make_accelerator(tmp_path / "run", [])
        assert (accelerator.num_processes, accelerator.distributed_type.value) == (1, "NO")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_run_does_not_go_on_with_other_captions(settings, world, tmp_path, monkeypatch):
    """Its steps, rates and order would be those of another run."""
    changes = {"train__save_steps": 2, "train__num_train_epochs": 2}
    data = shutil.copytree(world, tmp_path / "world")
    with monkeypatch.context() as patch:
        stop_before(4, patch)
        with pytest.raises(KeyboardInterrupt):
            train(settings(tmp_path / "run", data__root=data, **changes))
    ids = data / "annotations" / "train.txt"
    ids.write_text("".join(ids.read_text().splitlines(keepends=True)[:-4]))
    with pytest.raises(InputError, match=r"checkpoint-2 is of a run of 16 steps, today's data make 10"):
        train(settings(tmp_path / "run", data__root=data, **changes))
