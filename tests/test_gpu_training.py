"""Training on CUDA: a run, and two processes with NCCL. Run with `-m gpu` on a machine that has it."""

import os
import socket

import pytest
import torch
import torch.multiprocessing
from accelerate.utils import send_to_device

from samer.config import MergeConfig, ObjectsConfig, load_config
from samer.data import flickr
from samer.retrievers.hf import Retriever
from samer.retrievers.projectors import load_projector
from samer.runtime.processes import process_group, rank
from samer.training.batches import CaptionDataset, Collator
from samer.training.loop import train
from samer.training.model import ProjectorModel

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="needs a CUDA device")]
ROWS = (0, 21, 7, 2, 8, 36, 1, 30)  # images 0 4 1 0 | 1 7 0 6: some have captions on both sides
MERGE = MergeConfig(num_regions=12)


def settings(base, world, output, **changes):
    values = {
        "model.name": base,
        "data.root": world,
        "data.eval_split": "val",
        "merge.num_regions": 12,
        "train.output_dir": output,
        "train.train_batch_size": 8,
        "train.grad_accum_steps": 1,
        "train.num_train_epochs": 1,
        "train.learning_rate": 5e-3,
        "train.dataloader_num_workers": 1,
        "train.logging_steps": 1,
        "train.save_steps": 3,
        **changes,
    }
    return load_config(None, [f"{key}={value}" for key, value in values.items()])


@pytest.mark.parametrize("bf16", ["true", "false"])
def test_a_run_on_cuda_trains_the_projector_and_resumes(base, world, tmp_path, bf16):
    config = settings(base, world, tmp_path / "run", **{"train.bf16": bf16})
    result = train(config)
    assert result.steps == 8
    retriever = Retriever.load(str(base))
    saved = load_projector(tmp_path / "run", retriever)
    assert torch.isfinite(saved.weight).all()
    assert (saved.weight - retriever.base_projector.weight).abs().max() > 1e-3
    for name in ("projector.safetensors", "history.json"):
        (tmp_path / "run" / name).unlink()
    (tmp_path / "run/checkpoint-8/checksums.json").unlink()  # cut short: it goes on from step 6
    train(config)
    again = load_projector(tmp_path / "run", retriever)
    torch.testing.assert_close(again.weight, saved.weight, atol=1e-4, rtol=0)  # CUDA's sums have no fixed order


def test_loss_and_gradient_on_cuda_are_those_of_the_cpu(base, world):
    """Float32 on both, and no tensor cores unless torch is told to use them."""
    results = []
    for device in map(torch.device, ("cuda", "cpu")):
        retriever = Retriever.load(str(base), device=device, dtype=torch.float32)
        model = ProjectorModel(retriever, MERGE, 0.07, True).to(device)
        loss = model(**share_of(retriever, world, ROWS, device))["loss"]
        loss.backward()
        results.append((loss.item(), model.projection.weight.grad.cpu()))
    (ours, gradient), (expected, expected_gradient) = results
    assert ours == pytest.approx(expected, abs=1e-3)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-2, rtol=1e-2)


def one_of_two(number, port, base, world, folder):
    names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    device = torch.device("cuda", number)
    with process_group():
        results = {}
        for gather in (True, False):
            retriever = Retriever.load(str(base), device=device, dtype=torch.float32)
            model = ProjectorModel(retriever, MERGE, 0.07, gather).to(device)
            wrapped = torch.nn.parallel.DistributedDataParallel(model, device_ids=[number])
            loss = wrapped(**share_of(retriever, world, ROWS[4 * rank() :][:4], device))["loss"]
            loss.backward()
            grads = [model.projection.weight.grad.cpu(), model.projection.bias.grad.cpu()]
            results[gather] = (loss.item(), *grads)
        torch.save(results, folder / f"rank-{number}.pt")


def share_of(retriever, world, numbers, device):
    rows = CaptionDataset(flickr.load_split(world, "train", boxes=True)).rows
    batch = Collator(retriever, ObjectsConfig())([rows[k] for k in numbers])
    return send_to_device(batch, device)


@pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")
def test_two_processes_with_nccl_have_the_gradient_of_one(base, world, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (port, base, world, tmp_path), nprocs=2)
    saved = [torch.load(tmp_path / f"rank-{number}.pt", weights_only=True) for number in range(2)]
    device = torch.device("cuda")
    retriever = Retriever.load(str(base), device=device, dtype=torch.float32)
    for gather in (True, False):
        model = ProjectorModel(retriever, MERGE, 0.07, gather).to(device)
        shares = [ROWS] if gather else [ROWS[:4], ROWS[4:]]  # without, each share is scored against its own images
        loss = sum(model(**share_of(retriever, world, share, device))["loss"] for share in shares) / len(shares)
        loss.backward()
        assert sum(each[gather][0] for each in saved) / 2 == pytest.approx(loss.item(), abs=1e-4)
        for each in saved:
            for ours, layer in zip(each[gather][1:], (model.projection.weight, model.projection.bias)):
                torch.testing.assert_close(ours, layer.grad.cpu(), atol=1e-4, rtol=1e-3)
