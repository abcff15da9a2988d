"""Projector-only training on accelerate: one plain loop; the frozen retriever feeds it, the merge shapes the loss.

What a run leaves in its folder: config.yaml (as resolved), checkpoint-<step>/ (`checkpoints`), best/,
and at its end projector.safetensors + config.json and history.json, a list of log entries.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import send_to_device, set_seed
from safetensors import SafetensorError
from torch.optim import AdamW

from samer import evaluation
from samer.compressors import make_compressor
from samer.config import Config, InputError, TrainConfig, dump_config, load_config
from samer.data import make_reader
from samer.data.records import ImageRecord
from samer.features.read import open_encoder
from samer.retrievers.base import Encoder
from samer.retrievers.projectors import load_projector, save_projector
from samer.runtime.files import atomic_path, only_writer
from samer.runtime.processes import gather_objects, print0, rank, stop_asked, world_size
from samer.runtime.signals import Stopped, stop_here, stoppable
from samer.training import checkpoints
from samer.training.batches import CaptionDataset, Collator, RankBatches, WindowSampler, end_workers, make_loader
from samer.training.checkpoints import RunState
from samer.training.model import ProjectorModel


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves: where, how many steps, seconds of training and the last validation metrics."""

    output_dir: Path
    steps: int
    seconds: float
    validation: dict[str, float]


def train(config: Config) -> TrainResult:
    """Trains the projector as configured and writes `projector.safetensors` + `config.json` to the output folder.

    Resumes from the last complete checkpoint in the output folder if `train.resume` is on, with as many captions per
    step as before, whatever the number of processes.

    Raises:
        InputError: bad data, a folder that holds another run or is written to by another process, a full disk, a
            non-finite loss, a number of processes that can't share the run's steps.
        Stopped: SIGTERM came; a checkpoint of the last step is written.
    """
    with only_writer(config.train.output_dir):
        return _train(config)


def _train(config: Config) -> TrainResult:
    settings = config.train
    output = Path(settings.output_dir)
    if not config.data.root:
        raise InputError("data.root is not set; give the data set's folder as data.root=DIR (DATA_ROOT=DIR)")
    make_compressor(config.merge)  # an unknown name is refused before any work
    trackers = _trackers(settings.report_to)
    _check_output(output, config)
    if settings.resume and (output / "history.json").is_file() and (output / "projector.safetensors").is_file():
        print0(f"{output} holds this run, finished; nothing is left to train")
        return _result(output, _read_history(output / "history.json"), settings, 0.0)
    torn = checkpoints.torn(output)
    found = checkpoints.whole(output) if settings.resume else []
    state = checkpoints.read_state(found[-1]) if found else RunState()
    accumulation = _accumulation(settings, state, output) if found else settings.grad_accum_steps
    # without processes started by hand or torchrun, accelerate must not look for a GPU where there is none
    accelerator = Accelerator(
        mixed_precision="bf16" if settings.bf16 else "no",
        cpu=not torch.cuda.is_available(),
        log_with=trackers or None,
        project_dir=str(output / "runs") if trackers else None,
        # False would lay the gradients out anew after a start's first step, and sums of 3 round otherwise then
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    records, validation, retriever = _open(config, accelerator.device)
    dataset = CaptionDataset(records)
    gather_objects(None)  # no process may still be looking for a run in this folder when the first one marks it
    if rank() == 0:
        for folder in torn:
            print0(f"{folder} was cut short; removing it")
            checkpoints.remove(folder)
        with atomic_path(output / "config.yaml") as temporary:
            temporary.write_text(dump_config(config), encoding="utf-8")
    set_seed(settings.seed)
    model = ProjectorModel(retriever, config.merge, settings.temperature, settings.gather_negatives, settings.budgets)
    trainable = sum(p.numel() for p in model.parameters())
    dropped = sum(len(record.captions) for record in records) - len(dataset)
    print0(
        f"training {trainable:,} parameters of {config.model.name} on {len(dataset):,} captions of {len(records):,} "
        f"images ({dataset.boxless():,} captions name nothing boxed, {dropped:,} unrelated ones left out); "
        f"writing to {output}"
    )
    run = Run(config, accelerator, model, dataset, validation, accumulation, state)
    seconds = run.go(found[-1] if found else None)
    history = [*run.state.history, {"epoch": run.state.epoch, "step": run.state.step}]
    if rank() == 0:
        best = load_projector(output / "best", retriever) if settings.select_best and validation else None
        save_projector(output, best or model.projection.projector(), retriever, config.merge)
        with atomic_path(output / "history.json") as temporary:
            # sorted, so that bytes don't depend on the order of a log's values
            temporary.write_text(json.dumps(history, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return _result(output, history, settings, seconds)


def _open(config: Config, device: torch.device) -> tuple[list[ImageRecord], list[ImageRecord], Encoder]:
    """Everything that a run will read, looked at before its first step: both splits, and the encoder that has them."""
    data, load = config.data, make_reader(config.data.reader).load_split
    records = load(data.root, data.train_split, boxes=True, limit_images=data.limit_train_images)
    validation = []
    if data.eval_split:
        validation = load(data.root, data.eval_split, boxes=False, limit_images=data.limit_eval_images)
    retriever = open_encoder(
        config.model.name,
        device,
        features=data.features,
        dtype=torch.bfloat16 if config.train.bf16 else torch.float32,
        local_files_only=config.model.local_files_only,
        revision=config.model.revision,
    )
    retriever.check_records([*records, *validation])
    return records, validation, retriever


class Run:
    """A run at work: its model, optimizer and batches, and the state that its checkpoints keep."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        model: ProjectorModel,
        dataset: CaptionDataset,
        validation: list[ImageRecord],
        accumulation: int,
        state: RunState,
    ) -> None:
        """Lays everything out; `state` is a fresh one, or that of the checkpoint to go on from."""
        settings = config.train
        self.config, self.settings, self.accelerator, self.validation = config, settings, accelerator, validation
        self.output = Path(settings.output_dir)
        self.accumulation = accumulation
        rows = settings.train_batch_size
        order = WindowSampler(dataset, settings.seed, rows * world_size() if world_size() > 1 else 1)
        self.batches = RankBatches(order, rows, rank(), world_size())
        # a batch of stored features is large and quick to read: few workers, none far ahead
        stored = bool(config.data.features)
        workers = min(settings.dataloader_num_workers, 2) if stored else settings.dataloader_num_workers
        collate = Collator(model.retriever, config.objects)
        self.loader = make_loader(self.batches, dataset, collate, workers, 1 if stored else None)
        self.steps_per_epoch = math.ceil(len(self.batches) / accumulation)
        self.module = model
        decayed = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.model = accelerator.prepare(model)
        self.optimizer = AdamW([g for g in groups if g["params"]], lr=settings.learning_rate, fused=True)
        self.state = replace(
            state,
            max_steps=math.ceil(settings.num_train_epochs * self.steps_per_epoch),
            captions_per_step=rows * world_size() * accumulation,
            seed=settings.seed,
        )
        sums = state.loss_sums
        own = sums[rank()] if len(sums) == world_size() else sum(sums) / len(sums)
        self.loss_sum = torch.tensor(own, device=accelerator.device)  # since the last log, of this process
        self.pace = Pace(self.state)

    def go(self, checkpoint: Path | None) -> float:
        """Trains to the end, from `checkpoint` on if there is one; returns the seconds that it took."""
        started = time.monotonic()
        if checkpoint is not None:
            checkpoints.read_tensors(checkpoint, self.module, self.optimizer)
            gather_objects(None)  # every process has read it before the first one may change it
            if self.state.validates and not self.state.validated():
                self.validate()  # which failed, or was stopped
        if self.state.step >= self.state.max_steps or self.is_stale():
            print0(f"{checkpoint} is the end of this run; nothing is left to train")
            return time.monotonic() - started
        if checkpoint is not None:
            print0(f"resuming from {checkpoint}")
        if self.accelerator.log_with:
            self.accelerator.init_trackers(self.settings.run_name)
        with stoppable():
            try:
                self.loop()
            except RuntimeError as error:
                if "DataLoader worker" in str(error):  # SIGTERM may reach one before `_start_worker` does
                    stop_here()
                raise
            finally:
                end_workers(self.loader)
        if self.accelerator.log_with:
            self.accelerator.end_training()
        return time.monotonic() - started

    def loop(self) -> None:
        """Epochs of steps: batches, gradient, update; then what is due: log, validation, checkpoint."""
        state, every = self.state, self.settings
        while state.step < state.max_steps and not self.is_stale():
            epoch, done = divmod(state.step, self.steps_per_epoch)
            self.batches.begin(epoch, done * self.accumulation)
            batches = iter(self.loader)
            for position in range(done, self.steps_per_epoch):
                logged = self.step(list(islice(batches, self.accumulation)))
                state.step += 1
                state.epoch = epoch + min((position + 1) * self.accumulation, len(self.batches)) / len(self.batches)
                ends = position + 1 == self.steps_per_epoch or state.step >= state.max_steps
                state.validates = bool(self.validation) and ends
                if state.step % every.logging_steps == 0:
                    self.log_step(logged)
                stopping = stop_asked()
                if state.validates and not stopping:
                    self.validate()
                over = state.step >= state.max_steps or self.is_stale()
                if stopping or over or state.step % every.save_steps == 0:
                    self.save()
                if stopping:
                    print0(f"stopped after step {state.step} with a checkpoint in {self.output}")
                    raise Stopped
                if over:
                    return

    def step(self, batches: Sequence[dict]) -> dict[str, float]:
        """One optimizer step over the batches of an accumulation; returns what a log says of it."""
        number, settings = self.state.step + 1, self.settings
        self.module.diagnose = number % settings.logging_steps == 0
        for place, batch in enumerate(batches, 1):
            # gradients of several processes are exchanged once a step
            with nullcontext() if place == len(batches) else self.accelerator.no_sync(self.model):
                loss = self.model(**send_to_device(batch, self.accelerator.device))["loss"]
                if not torch.isfinite(loss):
                    raise InputError(
                        f"the loss is {float(loss.detach())} at step {number}; start anew in another "
                        "train.output_dir with a lower train.learning_rate, or train.bf16=false"
                    )
                loss = loss / len(batches)
                self.accelerator.backward(loss)
            self.loss_sum += loss.detach()
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm)
        rate = settings.learning_rate * rate_factor(self.state.step, self.state.max_steps, settings.warmup_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"grad_norm": float(norm), "learning_rate": rate}

    def log_step(self, values: dict[str, float]) -> None:
        """Logs the mean loss since the last log, over all processes, and what the object prior does."""
        state = self.state
        total = self.accelerator.gather(self.loss_sum.reshape(1)).mean().item()
        self.loss_sum.zero_()
        loss = total / (state.step - state.logged_at)
        state.logged_at = state.step
        self.log({"loss": loss, **values, **self.module.diagnostics})

    def log(self, values: dict[str, float]) -> None:
        """Into the history, to the trackers and as a line."""
        self.state.history.append({**values, "epoch": self.state.epoch, "step": self.state.step})
        if self.accelerator.log_with and self.accelerator.trackers:
            self.accelerator.log(values, step=self.state.step)
        self.pace.show(self.state, values)

    def validate(self) -> None:
        """Box-free retrieval metrics on the validation split with the projector as it stands.

        A checkpoint is written before, so that a picture that can't be read does not cost the epoch, and holds the
        metrics in the end.
        """
        self.save()
        retriever, settings = self.module.retriever, self.settings
        before = retriever.current_projector()
        retriever.use_projector(self.module.projection.projector())
        try:
            metrics = evaluation.evaluate_records(
                retriever, self.validation, self.module.merge, batch_size=settings.eval_batch_size
            )
        finally:
            retriever.use_projector(before)
        self.log({f"eval_{name}": value for name, value in metrics.items()})
        since = _evaluations_since_best(self.state.history)
        if settings.select_best and since == 0 and rank() == 0:
            projector = self.module.projection.projector()
            save_projector(self.output / "best", projector, retriever, self.config.merge)
        if self.is_stale():
            print0(f"validation R@1 has not improved in {since} evaluations; stopping")
        self.save()

    def is_stale(self) -> bool:
        """Whether validation has not improved for too long."""
        patience = self.settings.early_stop_patience
        return patience is not None and _evaluations_since_best(self.state.history) >= patience

    def save(self) -> None:
        """Writes the checkpoint of this step; one that is there already gets what was logged since."""
        folder = checkpoints.place_of(self.output, self.state.step)
        self.state.loss_sums = gather_objects(self.loss_sum.item())
        self.state.world_size = world_size()
        if rank() == 0:
            try:
                if (folder / checkpoints.CHECKSUMS).is_file():
                    checkpoints.write_state(folder, self.state)
                else:
                    checkpoints.write_tensors(folder, self.module, self.optimizer)
                    save_projector(folder, self.module.projection.projector(), self.module.retriever, self.config.merge)
                    checkpoints.write_state(folder, self.state)
                    checkpoints.finish(folder)
            except (OSError, SafetensorError, InputError) as error:
                reason = " ".join(str(error).split())[:200]
                raise InputError(
                    f"{folder}: a checkpoint can't be written ({reason}); make room and run the same command again to "
                    "go on"
                ) from None
        gather_objects(None)  # no process goes on before it is written


def rate_factor(step: int, max_steps: int, warmup_ratio: float) -> float:
    """What the learning rate of a step, from 0, is multiplied by: a linear warm-up, then half a cosine down to 0."""
    warmup = math.ceil(max_steps * warmup_ratio)
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, max_steps - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


class Pace:
    """One plain line per log on the first process: step, loss, rate, throughput, time left."""

    def __init__(self, state: RunState) -> None:
        self.started, self.first = time.monotonic(), state.step

    def show(self, state: RunState, values: dict[str, float]) -> None:
        """Prints what was logged."""
        done = state.step - self.first
        if "loss" in values and done:
            pace = (time.monotonic() - self.started) / done
            words = [
                f"step {state.step}/{state.max_steps}",
                f"loss {values['loss']:.4f}",
                f"lr {values['learning_rate']:.2e}",
                f"{state.captions_per_step / pace:.1f} captions/s",
                f"{pace * (state.max_steps - state.step) / 60:.1f} min left",
            ]
            words += [f"{name} {values[name]:.3f}" for name in ("object_mass_on_own", "entropy") if name in values]
            print0(" | ".join(words))
        elif "eval_r@1" in values:
            shown = ", ".join(f"{name} {values[f'eval_{name}']:.1f}" for name in ("r@1", "r@5", "r@10"))
            print0(f"step {state.step}/{state.max_steps} | validation, box-free: {shown}")


def _accumulation(settings: TrainConfig, state: RunState, output: Path) -> int:
    """Batches per step and process that keep a run's captions per step.

    Raises:
        InputError: this number of processes can't.
    """
    rows = settings.train_batch_size * world_size()
    if state.captions_per_step % rows:
        raise InputError(
            f"{output} holds a run of {state.captions_per_step} captions per step ({state.world_size} processes); "
            f"{world_size()} processes with train.train_batch_size={settings.train_batch_size} take {rows} at a time, "
            "which does not divide it; start as many processes as before"
        )
    accumulation = state.captions_per_step // rows
    if accumulation != settings.grad_accum_steps:
        print0(
            f"{world_size()} processes instead of {state.world_size}: {accumulation} batches per step and process "
            f"instead of {settings.grad_accum_steps} keep {state.captions_per_step} captions per step"
        )
    return accumulation


def _trackers(report_to: str) -> list[str]:
    """Names of the trackers to log to, all of them installed.

    Raises:
        InputError: one that accelerate does not know, or that is not installed.
    """
    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    there = {str(tracker.value if hasattr(tracker, "value") else tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in known:
            raise InputError(f"train.report_to: {name!r} is unknown; use none, or some of {', '.join(known)}")
        if name not in there:
            raise InputError(f"train.report_to: {name} is not installed; pip install {name}, or train.report_to=none")
    return names


def _read_history(path: Path) -> list[dict]:
    try:
        history = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(history, list) and all(isinstance(entry["step"], int) for entry in history) and history):
            raise ValueError("no list of steps")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not readable ({str(error)[:120]}); remove it to end this run again") from None
    return history


def _result(output: Path, history: list[dict], settings: TrainConfig, seconds: float) -> TrainResult:
    evaluations = [entry for entry in history if "eval_r@1" in entry]
    final = evaluations[-1] if evaluations else {}
    if settings.select_best and evaluations:
        final = max(evaluations, key=lambda entry: entry["eval_r@1"])  # the first of equals, as in best/
        print0(f"keeping the projector of step {final['step']}, validation R@1 {final['eval_r@1']:.1f}")
    metrics = {name.removeprefix("eval_"): value for name, value in final.items() if name.startswith("eval_")}
    return TrainResult(output, max(entry["step"] for entry in history), seconds, metrics)


def _evaluations_since_best(history: list[dict]) -> int:
    """How many evaluations came after the best one, the first of equals; 0 also if there is none."""
    measured = [entry["eval_r@1"] for entry in history if "eval_r@1" in entry]
    return len(measured) - 1 - measured.index(max(measured)) if measured else 0


def _check_output(output: Path, config: Config) -> None:
    """Refuses a folder that holds a run with other settings; where training goes on must not change unseen."""
    previous = output / "config.yaml"
    if not previous.is_file():
        return
    old = load_config(previous)
    if not config.train.resume:
        raise InputError(f"{output} holds a run and train.resume is false; name another train.output_dir or remove it")
    free = ("output_dir", "report_to", "run_name", "dataloader_num_workers", "eval_batch_size")
    for section in ("model", "data", "merge", "objects", "train"):
        before, now = vars(getattr(old, section)), vars(getattr(config, section))
        for key, value in now.items():
            if before[key] != value and key not in free:
                raise InputError(
                    f"{output} holds a run with {section}.{key}={before[key]!r}, now {value!r}; "
                    "name another train.output_dir, or remove it to start anew"
                )
