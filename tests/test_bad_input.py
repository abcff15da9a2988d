"""Bad input from outside: one line that names it and says what to do, exit status 2, nothing half-written."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from samer.config import InputError, MergeConfig, load_config
from samer.index.read import Index
from samer.retrievers.base import Projector
from samer.retrievers.hf import Retriever
from samer.retrievers.projectors import save_projector
from samer.runtime.commands import run
from samer.training import model as training_model


@pytest.fixture(scope="module")
def frozen(base):
    return Retriever.load(str(base), dtype=torch.float32)


@pytest.fixture(scope="module")
def adapter(frozen, tmp_path_factory):
    """A projector of `base` that is not its own, with 4 regions."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    layer = frozen.base_projector
    save_projector(folder, Projector(layer.weight + 0.01, layer.bias), frozen, MergeConfig(num_regions=4))
    return folder


@dataclass
class Bench:
    """A copy of the world to spoil, and the command lines that read it; everything written goes to `out`."""

    folder: Path
    base: Path
    adapter: Path
    script: object

    def __post_init__(self):
        self.out = self.folder / "out"
        self.world = self.folder / "world"
        self.notes = self.folder / "world" / "annotations"

    def ids(self, split="train"):
        return (self.notes / f"{split}.txt").read_text().split()

    def picture(self, split="train"):
        return self.world / "images" / "Images" / f"{self.ids(split)[1]}.jpg"

    def xml(self):
        return self.notes / "Annotations" / f"{self.ids()[1]}.xml"

    def sentences(self, split="train"):
        return self.notes / "Sentences" / f"{self.ids(split)[1]}.txt"

    def config(self, text=""):
        """A config file for a short run, `text` added at its end."""
        path = self.folder / "run.yaml"
        path.write_text(
            f"model:\n  name: {self.base}\ndata:\n  root: {self.world}\ntrain:\n  output_dir: {self.out / 'run'}\n"
            "  train_batch_size: 4\n  grad_accum_steps: 1\n  num_train_epochs: 0.2\n  bf16: false\n"
            f"  dataloader_num_workers: 0\n{text}"
        )
        return str(path)

    def train(self, *overrides, text=""):
        return ["train", "--config", self.config(text), "merge.num_regions=8", *overrides]

    def cache(self, *rest, model=None):
        words = ["cache", "--data-root", self.world, "--cache-dir", self.out / "cache", "--splits", "val", "test"]
        own = [] if "--adapter-path" in rest else [f"model.name={model or self.base}", "merge.num_regions=8"]
        rest = [str(word) for word in rest]
        return [*map(str, words), *(word for word in rest if "=" not in word), *own, *(w for w in rest if "=" in w)]

    def eval(self, *rest):
        words = ["eval", "--cache-dir", self.out / "cache", "--split", "test"]
        return [str(word) for word in [*words, "--output-json", self.out / "metrics.json", *rest]]

    def model(self):
        return f"model.name={self.base}"

    def main(self, words):
        return self.script(words[0]).main(words[1:])

    def written(self):
        return {str(p.relative_to(self.out)): p.read_bytes() for p in sorted(self.out.rglob("*")) if p.is_file()}


@pytest.fixture
def bench(world, base, adapter, script, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    return Bench(tmp_path, base, adapter, script)


def replace(path, old, new, count=1):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, count), encoding="utf-8")


def truncate(path):
    path.write_bytes(path.read_bytes()[:900])


def spoil_box(bench):
    old = bench.xml().read_text()
    start, end = old.index("<xmax>"), old.index("</xmax>")
    bench.xml().write_text(old[:start] + "<xmax>99999" + old[end:])


def spoil_id(bench, text):
    with (bench.notes / "train.txt").open("a") as file:
        file.write(text + "\n")


def change_adapter(bench, weight=None, **settings):
    folder = shutil.copytree(bench.adapter, bench.folder / "adapter")
    old = json.loads((folder / "config.json").read_text())
    if weight is not None:
        projector = Projector(weight, torch.zeros(len(weight)))
        save_file({"weight": projector.weight, "bias": projector.bias}, folder / "projector.safetensors")
        settings = {**settings, "projector": projector.hash}
    (folder / "config.json").write_text(json.dumps({**old, **settings}))
    return folder


def change_base(bench, part, value):
    """A copy of the base with one value of one weight replaced."""
    folder = shutil.copytree(bench.base, bench.folder / "base")
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if name.endswith(part)]
    weights[name].view(-1)[0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def small_file(bench):
    bench.out.mkdir(exist_ok=True)
    (bench.out / "file").write_text("mine")
    return bench.out / "file"


def do(*steps):
    return [step for step in steps if isinstance(step, list)][-1]


# name -> (what is done to a bench, ending with the command line; words that the message holds, {...} filled from it)
CASES = {
    # the data
    "no data.root": (lambda b: b.train("data.root="), ["data.root", "DATA_ROOT"]),
    "data.root null": (lambda b: b.train("data.root=null"), ["null: not a folder", "DATA_ROOT"]),
    "no such root": (lambda b: b.train(f"data.root={b.folder}/no"), ["{folder}/no: not a folder", "DATA_ROOT"]),
    "root is a file": (lambda b: b.train(f"data.root={b.xml()}"), ["{xml}: not a folder", "DATA_ROOT"]),
    "root is empty": (
        lambda b: b.train(f"data.root={b.world}/images", "data.name=flickr"),
        ["no split file", "DATA_ROOT"],
    ),
    "root of no known kind": (
        lambda b: b.train(f"data.root={b.world}/images"),
        ["images: no data set of a known kind", "flickr: ", "dataset_coco.json", "DATA_ROOT"],
    ),
    "cache: no such root": (lambda b: b.cache("--data-root", b.folder / "no"), ["{folder}/no: not a folder"]),
    "unknown split": (lambda b: b.train("data.train_split=trian"), ["no split 'trian'", "test, train, val"]),
    "cache: unknown split": (lambda b: b.cache("--splits", "tset"), ["no split 'tset'", "test, train, val"]),
    "absent image": (lambda b: do(b.picture().unlink(), b.train()), ["{picture_name}", "1 of 12", "restore"]),
    "cache: absent image": (
        lambda b: do(b.picture("test").unlink(), b.cache()),
        ["{test_picture_name}", "1 of 8", "restore"],
    ),
    "truncated image": (lambda b: do(truncate(b.picture()), b.train("train.num_train_epochs=1")), ["{picture}"]),
    "cache: truncated image": (
        lambda b: do(truncate(b.picture("val")), b.cache()),
        ["{val_picture}: not a readable image", "copy it again"],
    ),
    "no image at all": (
        lambda b: do(b.picture().write_bytes(b"GIF? no"), b.train("train.num_train_epochs=1")),
        ["{picture}: not a readable image"],
    ),
    "malformed XML": (lambda b: do(b.xml().write_text("<annotation><size>"), b.train()), ["{xml}: malformed XML"]),
    "no XML": (lambda b: do(b.xml().unlink(), b.train()), ["{xml}: can't be read", "restore"]),
    "box outside": (
        lambda b: do(spoil_box(b), b.train("data.strict=true")),
        ["{xml}: object 1", "99999", "outside", "correct"],
    ),
    "no Annotations": (
        lambda b: do(shutil.rmtree(b.notes / "Annotations"), b.train()),
        ["no Annotations folder", "restore"],
    ),
    "four captions": (
        lambda b: do(b.sentences().write_text("A\nB\nC\nD\n"), b.train()),
        ["{sentences}: 4 captions", "exactly 5"],
    ),
    "cache: six captions": (
        lambda b: do(b.sentences("test").write_text("A\nB\nC\nD\nE\nF\n"), b.cache()),
        ["{test_sentences}: 6 captions", "exactly 5"],
    ),
    "malformed markup": (
        lambda b: do(replace(b.sentences(), "[/EN#", "[/EM#"), b.train()),
        ["{sentences}: line ", "malformed markup"],
    ),
    "not UTF-8": (lambda b: do(b.sentences().write_bytes(b"caf\xe9\n" * 5), b.train()), ["{sentences}: not UTF-8"]),
    "id with a separator": (
        lambda b: do(spoil_id(b, "../../etc/passwd"), b.train()),
        ["train.txt: line 13: '../../etc/passwd' is not an image id"],
    ),
    "cache: id with a separator": (
        lambda b: do(spoil_id(b, "a\\b"), b.cache("--splits", "train")),
        ["train.txt: line 13:", "not an image id"],
    ),
    "id given twice": (lambda b: do(spoil_id(b, b.ids()[0]), b.train()), ["train.txt: line 13", "also on line 1"]),
    "zero images": (lambda b: do((b.notes / "train.txt").write_text("\n"), b.train()), ["train.txt: zero images"]),
    "cache: zero images": (lambda b: do((b.notes / "val.txt").write_text(""), b.cache()), ["val.txt: zero images"]),
    "all captions unrelated": (
        lambda b: do(
            (b.notes / "UNRELATED_CAPTIONS").write_text("".join(f"{b.ids()[0]} {k}\n" for k in range(1, 6))),
            b.train("data.limit_train_images=1"),
        ),
        ["no caption to train on", "UNRELATED_CAPTIONS"],
    ),
    # the settings
    "unknown key": (
        lambda b: b.train(text="  learning_rat: 1\n"),
        ["run.yaml: unknown key train.learning_rat; did you mean train.learning_rate?"],
    ),
    "unknown section": (lambda b: b.train(text="trane:\n  seed: 1\n"), ["unknown key trane; did you mean train?"]),
    "unknown override": (lambda b: b.train("merge.regions=4"), ["merge.regions", "merge.num_regions"]),
    "cache: unknown override": (lambda b: b.cache("merge.regions=4"), ["merge.regions", "merge.num_regions"]),
    "cache: override without section": (lambda b: b.cache("num_regions=4"), ["'num_regions=4'", "section.key=value"]),
    "text for a number": (
        lambda b: b.train(text="  seed: many\n"),
        ["run.yaml: train.seed must be a whole number; it is 'many'"],
    ),
    "number for a flag": (lambda b: b.train("train.gather_negatives=3"), ["train.gather_negatives must be true or"]),
    "list for a section": (lambda b: b.train(text="objects:\n  - 1\n"), ["objects must be a mapping"]),
    "not YAML": (lambda b: b.train(text="merge: [\n"), ["run.yaml: not a readable YAML file"]),
    "no config": (lambda b: ["train", "--config", f"{b.folder}/no.yaml"], ["{folder}/no.yaml: no such file"]),
    "cache: config is a folder": (lambda b: b.cache("--config", b.folder), ["{folder}: not a readable YAML file"]),
    "no regions": (lambda b: b.train("merge.num_regions=0"), ["merge.num_regions must be at least 1; it is 0"]),
    "cache: no regions": (lambda b: b.cache("merge.num_regions=-3"), ["merge.num_regions must be at least 1"]),
    "batch size 0": (lambda b: b.train("train.train_batch_size=0"), ["train.train_batch_size must be at least 1"]),
    "eval batch size 0": (lambda b: b.train("train.eval_batch_size=0"), ["train.eval_batch_size must be at least 1"]),
    "cache: batch size 0": (lambda b: b.cache("--batch-size", "0"), ["batch size must be at least 1; it is 0"]),
    "cache: limit 0": (lambda b: b.cache("--limit-images", "0"), ["limit_images is 0; give at least 1"]),
    "cache: dtype": (
        lambda b: b.cache("--cache-dtype", "int4"),
        ["'int4'", "float32, bfloat16, float16, int8, binary"],
    ),
    "cache: device": (lambda b: b.cache("--device", "tpu9"), ["device 'tpu9' can't be used here"]),
    "eval: device": (lambda b: b.eval("--device", "warp:1"), ["device 'warp:1' can't be used here"]),
    "reporter": (lambda b: b.train("train.report_to=nowhere"), ["nowhere"]),
    # the model and the projector
    "no such model": (
        lambda b: b.train(f"model.name={b.folder}/no"),
        ["{folder}/no", "can't be loaded", "name a ColPali in transformers format"],
    ),
    "cache: no such model": (lambda b: b.cache(model="nobody/nothing"), ["'nobody/nothing' can't be loaded"]),
    "NaN in the model": (
        lambda b: b.train(f"model.name={change_base(b, 'model.norm.weight', float('nan'))}"),
        ["{folder}/base gave NaN or infinite features"],
    ),
    "cache: NaN in the model": (
        lambda b: b.cache(model=change_base(b, "model.norm.weight", float("nan"))),
        ["{folder}/base gave NaN or infinite features"],
    ),
    "cache: NaN in the model's projection": (
        lambda b: b.cache(model=change_base(b, "embedding_proj_layer.bias", float("nan"))),
        ["holds NaN or infinite values", "another checkpoint"],
    ),
    "cache: no such adapter": (
        lambda b: b.cache("--adapter-path", b.folder / "no"),
        ["{folder}/no: no such projector", "scripts/train.py"],
    ),
    "cache: empty adapter": (
        lambda b: do((b.folder / "adapter").mkdir(), b.cache("--adapter-path", b.folder / "adapter", b.model())),
        ["{folder}/adapter: no projector.safetensors"],
    ),
    "cache: adapter of another base": (
        lambda b: b.cache("--adapter-path", change_adapter(b, base_projector="0" * 64)),
        ["{folder}/adapter: this projector was trained on", "give the same base model"],
    ),
    "cache: adapter of another size": (
        lambda b: b.cache("--adapter-path", change_adapter(b, torch.zeros(8, 32))),
        ["(8, 32)", "(16, 32)", "another base model"],
    ),
    "cache: adapter of NaN": (
        lambda b: b.cache("--adapter-path", change_adapter(b, torch.full((16, 32), float("nan")))),
        ["holds NaN or infinite values"],
    ),
    "cache: altered adapter": (
        lambda b: b.cache("--adapter-path", change_adapter(b, projector="0" * 64)),
        ["projector.safetensors", "damaged"],
    ),
    "cache: adapter of another format": (
        lambda b: b.cache("--adapter-path", change_adapter(b, format_version=9)),
        ["config.json", "version 9", "use the SaMer version that wrote it"],
    ),
    "cache: adapter without a base": (
        lambda b: b.cache("--adapter-path", change_adapter(b, base_model=None)),
        ["{folder}/adapter/config.json: no base_model", "--config"],
    ),
    "cache: adapter without settings": (
        lambda b: b.cache("--adapter-path", change_adapter(b, merge=[64])),
        ["{folder}/adapter/config.json: no base_model or no merge settings", "--config"],
    ),
    # where things go
    "output is a file": (lambda b: b.train(f"train.output_dir={small_file(b)}"), ["{out}/file", "name another"]),
    "output below a file": (
        lambda b: b.train(f"train.output_dir={small_file(b)}/run"),
        ["{out}/file/run", "can't be written", "name another"],
    ),
    "cache: output is a file": (lambda b: b.cache("--cache-dir", small_file(b)), ["{out}/file", "name another folder"]),
    "cache: output below a file": (
        lambda b: b.cache("--cache-dir", small_file(b) / "c"),
        ["{out}/file/c", "can't be written", "name another"],
    ),
    "cache: output in a folder of files": (lambda b: b.cache("--cache-dir", small_file(b).parent), ["no SaMer index"]),
    "scenes: output is not empty": (
        lambda b: ["scenes", "--out", str(small_file(b).parent)],
        ["{out} exists and holds something else"],
    ),
    "scenes: output is a file": (lambda b: ["scenes", "--out", str(small_file(b))], ["{out}/file exists"]),
    "scenes: no images": (lambda b: ["scenes", "--out", f"{b.out}/w", "--val", "0"], ["val asks for 0 images"]),
    "eval: no cache": (lambda b: b.eval(), ["{out}/cache: no manifest.json", "bash/cache.sh"]),
}


def message_of(bench, words):
    with pytest.raises(InputError) as caught:
        bench.main(words)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", CASES)
def test_the_message_names_it_and_nothing_is_half_written(bench, name):
    spoil, expected = CASES[name]
    values = {
        "folder": bench.folder,
        "out": bench.out,
        "xml": bench.xml(),
        "picture": bench.picture(),
        "picture_name": bench.picture().name,
        "test_picture_name": bench.picture("test").name,
        "val_picture": bench.picture("val"),
        "sentences": bench.sentences(),
        "test_sentences": bench.sentences("test"),
    }
    words = spoil(bench)
    mine = bench.written()
    message = message_of(bench, words)
    for part in expected:
        assert part.format(**values) in message
    # a run that got as far as training has written its settings, a complete file; nothing else is there
    left = bench.written()
    assert {path: data for path, data in left.items() if path != "run/config.yaml"} == mine
    load_config(bench.out / "run" / "config.yaml" if "run/config.yaml" in left else None)


# --- eval and cache on an index that is there ------------------------------------------------------------------------


@pytest.fixture
def cached(bench):
    bench.main(bench.cache())
    return bench


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda b: b.cache("--adapter-path", b.adapter, "merge.num_regions=8"), "projector="),
        (lambda b: b.cache("merge.num_regions=4"), "holds an index with merge.num_regions=8, now 4"),
        (lambda b: b.cache("--cache-dtype", "float32"), "holds an index with dtype=bfloat16, now float32"),
        (lambda b: do(truncate(b.picture()), b.cache("--splits", "train")), "not a readable image"),
        (lambda b: b.eval("--split", "train"), "no split 'train' in this index; it holds: test, val"),
        (lambda b: b.eval("--output-json", b.out / "cache"), "cache: can't be written"),
        (lambda b: b.eval("--output-json", b.xml() / "metrics.json"), "metrics.json: can't be written"),
    ],
)
def test_a_finished_index_stays_as_it_is(cached, spoil, expected):
    before = cached.written()
    message = message_of(cached, spoil(cached))
    assert expected in message
    assert cached.written() == before


def test_a_damaged_shard_is_named_by_eval(cached):
    shard = cached.out / "cache" / "test" / "images-00000.safetensors"
    truncate(shard)
    assert message_of(cached, cached.eval()).startswith(str(shard))
    assert not (cached.out / "metrics.json").exists()


def test_a_shard_finished_before_the_bad_image_is_kept(bench, monkeypatch):
    monkeypatch.setattr("samer.index.write.IMAGES_PER_SHARD", 1)
    whole = bench.picture("test").read_bytes()
    truncate(bench.picture("test"))
    assert str(bench.picture("test")) in message_of(bench, bench.cache("--splits", "test"))
    assert list(bench.written()) == ["cache/test/images-00000.safetensors"]
    bench.picture("test").write_bytes(whole)
    (summary,) = bench.main(bench.cache("--splits", "test"))
    assert (summary.reused_shards, summary.images) == (1, 8)
    assert len(list(Index(bench.out / "cache").images("test"))) == 8


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(bench, monkeypatch, value):
    loss, calls = training_model.multi_positive_t2i_loss, []

    def spoiled(*words):
        calls.append(1)
        return loss(*words) * (value if len(calls) == 2 else 1)

    monkeypatch.setattr(training_model, "multi_positive_t2i_loss", spoiled)
    assert f"the loss is {value} at step 2" in message_of(bench, bench.train("train.num_train_epochs=1"))
    assert list(bench.written()) == ["run/config.yaml"]


def test_features_that_are_not_finite_stop_the_run(bench, monkeypatch):
    hidden = Retriever.hidden_states
    monkeypatch.setattr(Retriever, "hidden_states", lambda self, inputs: hidden(self, inputs) * float("nan"))
    assert "NaN" in message_of(bench, bench.train())
    assert list(bench.written()) == ["run/config.yaml"]
    assert "NaN" in message_of(bench, bench.cache())
    assert list(bench.written()) == ["run/config.yaml"]


def test_a_bad_validation_image_leaves_a_checkpoint_to_resume(bench):
    whole = bench.picture("val").read_bytes()
    truncate(bench.picture("val"))
    assert str(bench.picture("val")) in message_of(bench, bench.train())
    left = bench.written()
    assert {path.split("/")[1] for path in left} == {"config.yaml", "checkpoint-3"}
    assert "run/checkpoint-3/state.json" in left
    bench.picture("val").write_bytes(whole)
    bench.main(bench.train())
    bench.main(bench.train(f"train.output_dir={bench.out / 'clean'}"))
    written = bench.written()
    assert written["run/projector.safetensors"] == written["clean/projector.safetensors"]


def test_another_run_in_the_folder_is_named(bench):
    bench.main(bench.train())
    before = bench.written()
    assert "merge.num_regions=8, now 4" in message_of(bench, bench.train("merge.num_regions=4"))
    assert "train.seed=0, now 1" in message_of(bench, bench.train("train.seed=1"))
    assert "train.resume is false" in message_of(bench, bench.train("train.resume=false"))
    assert bench.written() == before


# --- what looks odd and is not bad ----------------------------------------------------------------------------------


def test_a_learning_rate_written_as_5e_5_works(bench):
    """PyYAML reads 5e-5 as text."""
    result = bench.main(bench.train(text="  learning_rate: 5e-5\n  weight_decay: 1e-5\n"))
    settings = load_config(result.output_dir / "config.yaml").train
    assert (settings.learning_rate, settings.weight_decay) == (5e-5, 1e-5)
    assert (result.output_dir / "projector.safetensors").is_file()


def test_captions_that_name_nothing_boxed_train_and_are_counted(bench, capsys):
    """Phrases without boxes, captions without phrases and unrelated captions are part of the real data."""
    one, two, *_ = bench.ids()
    size = "<size><width>8</width><height>8</height></size>"
    flag = "<object><name>1</name><scene>0</scene><nobndbox>1</nobndbox></object>"
    (bench.notes / "Annotations" / f"{one}.xml").write_text(f"<annotation>{size}{flag}</annotation>")
    sentences = bench.notes / "Sentences" / f"{two}.txt"
    sentences.write_text("It is noon .\n" + sentences.read_text().split("\n", 1)[1])
    (bench.notes / "UNRELATED_CAPTIONS").write_text(f"{two} 5\n")
    result = bench.main(bench.train("data.limit_train_images=2", "train.num_train_epochs=1", "train.logging_steps=1"))
    boxless = sum("[/EN#" not in line for line in sentences.read_text().splitlines()[:4])
    assert boxless >= 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("training ")]
    assert f"on 9 captions of 2 images ({5 + boxless} captions name nothing boxed, 1 unrelated ones left out)" in line
    history = json.loads((result.output_dir / "history.json").read_text())
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 3
    assert all(0 <= loss < 100 for loss in losses)
    assert losses[0] > 0  # the last batch is a single caption, which has no negative


def test_an_index_needs_no_good_boxes(bench):
    """The index never opens Annotations, so a malformed file there is no matter."""
    for path in (bench.notes / "Annotations").iterdir():
        path.write_text("<annotation><size>")
    assert [summary.images for summary in bench.main(bench.cache())] == [6, 8]


# --- exit status ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("a.txt: bad; mend it"), 2, "error: a.txt: bad; mend it\n"),
        (InputError("a.txt: two\n  lines"), 2, "error: a.txt: two lines\n"),
        (
            InputError("Caught InputError in worker 0.\nTraceback ...\nsamer.settings.InputError: a.txt: bad\n"),
            2,
            "error: a.txt: bad\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to go on\n"),
    ],
)
def test_an_error_becomes_one_line_and_a_status(capsys, error, status, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run(main)
    assert stopped.value.code == status
    assert capsys.readouterr() == ("", line)


def test_a_defect_keeps_its_traceback():
    def main():
        raise ValueError("a defect of SaMer")

    with pytest.raises(ValueError, match="a defect of SaMer"):
        run(main)


def test_a_good_run_exits_with_0(capsys):
    assert run(lambda: {"value": 1}) is None
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (lambda b: b.train("merge.regions=4"), "unknown key merge.regions"),
        (lambda b: b.cache("--device", "tpu9"), "device 'tpu9' can't be used here"),
        (lambda b: b.eval(), "no manifest.json"),
        (  # the collator runs in worker processes, whose errors arrive wrapped in a traceback
            lambda b: do(truncate(b.picture()), b.train("train.num_train_epochs=1", "train.dataloader_num_workers=2")),
            "not a readable image",
        ),
    ],
)
def test_a_process_prints_one_line_and_exits_with_2(bench, command, words, expected):
    name, *rest = words(bench)
    done = command(sys.executable, f"scripts/{name}.py", *rest)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert expected in errors[0]
    assert done.stderr.endswith(errors[0] + "\n")
    assert "Traceback" not in done.stderr + done.stdout
    assert set(bench.written()) <= {"run/config.yaml"}
