"""Projector-only training on transformers.Trainer: the frozen retriever feeds it, the merge shapes the loss.

Shape letters: B captions of this process, U distinct images, N tokens, K regions, D embedding, I images scored.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback, TrainerState

from samer import evaluation
from samer.compressors import make_compressor
from samer.config import Config, InputError, TrainConfig, dump_config, load_config
from samer.data import make_reader
from samer.data.records import ImageRecord
from samer.features.read import open_encoder
from samer.retrievers.projectors import load_projector, save_projector
from samer.runtime.files import atomic_path, file_hash, only_writer, read_json, write_json
from samer.runtime.processes import gather_objects, print0, rank, stop_asked, world_size
from samer.runtime.shards import bare_name
from samer.runtime.signals import Stopped, stop_here, stoppable
from samer.training.batches import CaptionDataset, Collator, WindowSampler
from samer.training.model import ProjectorModel

STATE = "trainer_state.json"
CHECKSUMS = "checksums.json"  # the last file of a checkpoint: SHA-256 of the others but STATE, which validation changes
CONTINUATION = "continuation.json"  # of a checkpoint: losses summed up for the next log; is its step validated
KEPT_CHECKPOINTS = 2


class SamerTrainer(Trainer):
    """Trainer that logs the object diagnostics, evaluates by retrieval and saves projectors."""

    def __init__(self, *args, validation: list[ImageRecord], config: Config, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.validation = validation
        self.samer_config = config
        self.continuation: dict[str, Any] = {}  # what a checkpoint keeps beside Trainer's own files
        self.saved_step = -1  # of the newest checkpoint
        self.loader: DataLoader | None = None  # of the captions, once training has begun

    def _get_train_sampler(self, train_dataset=None):
        step = self.args.train_batch_size * world_size() if world_size() > 1 else 1
        self.sampler = WindowSampler(self.train_dataset, self.args.seed, step)
        return self.sampler

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper does not hand attributes on
        inner.worker_init_fn = partial(_start_worker, inner.worker_init_fn)
        inner.generator = torch.Generator()  # workers' seeds leave the state that checkpoints keep alone
        self.loader = inner
        return loader

    def end_workers(self) -> None:
        """Ends the data loader's workers; left to the garbage collector, each is waited for 5 seconds."""
        iterator = getattr(self.loader, "_iterator", None)
        if iterator is not None:
            self.loader._iterator = None
            iterator._shutdown_workers()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        module = self.accelerator.unwrap_model(model)
        module.diagnose = (self.state.global_step + 1) % self.args.logging_steps == 0
        outputs = model(**inputs)
        if not torch.isfinite(outputs["loss"]):
            raise InputError(
                f"the loss is {float(outputs['loss'].detach())} at step {self.state.global_step + 1}; start anew in "
                "another train.output_dir with a lower train.learning_rate, or train.bf16=false"
            )
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            logs = {**logs, **self.accelerator.unwrap_model(self.model).diagnostics}
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Box-free retrieval metrics on the validation split with the projector as it stands.

        While training, a checkpoint is written before, so that a picture that can't be read does not cost the epoch,
        and holds the metrics in the end.
        """
        if self.is_in_train:
            self._save_checkpoint(self.model, None)
        module = self.accelerator.unwrap_model(self.model)
        retriever = module.retriever
        before = retriever.current_projector()
        retriever.use_projector(module.projection.projector())
        try:
            metrics = evaluation.evaluate_records(
                retriever, self.validation, module.merge, batch_size=self.args.eval_batch_size
            )
        finally:
            retriever.use_projector(before)
        values = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(values)
        self._watch_best(module)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, values)
        if self.is_in_train:
            self._save_checkpoint(self.model, None)
        return values

    def make_up_for_validation(self, checkpoint: Path) -> None:
        """Adds the metrics to a checkpoint, whose state is loaded, if its validation failed."""
        step = self.state.global_step
        validated = any("eval_r@1" in entry and entry["step"] == step for entry in self.state.log_history)
        if read_json(checkpoint / CONTINUATION)["validates"] and not validated:
            self._load_from_checkpoint(str(checkpoint))
            self.evaluate()
            self.saved_step = step
            self._save_checkpoint(self.model, None)

    def _watch_best(self, module: ProjectorModel) -> None:
        """Keeps the projector of the best validation R@1 in best/ and stops when it has not improved for too long."""
        settings = self.samer_config.train
        since = _evaluations_since_best(self.state.log_history)
        if settings.select_best and since == 0 and rank() == 0:
            folder = Path(settings.output_dir) / "best"
            save_projector(folder, module.projection.projector(), module.retriever, self.samer_config.merge)
        if _is_stale(settings, self.state.log_history):
            print0(f"validation R@1 has not improved in {since} evaluations; stopping")
            self.control.should_training_stop = True
            self.control.should_save = True  # the end of the run, as max_steps would be

    def take_up_loss(self, continuation: dict) -> None:
        """Goes on with the sum of losses since the last log as a checkpoint holds it."""
        sums = continuation["loss_sums"]
        self._tr_loss += sums[rank()] if len(sums) == world_size() else float(np.mean(sums))
        self._globalstep_last_logged = continuation["logged_at"]

    def _save_checkpoint(self, model, trial) -> None:
        if self.saved_step == self.state.global_step:  # written already: only what was logged since is new
            if rank() == 0:
                with atomic_path(Path(self.args.output_dir) / f"checkpoint-{self.saved_step}" / STATE) as temporary:
                    self.state.save_to_json(str(temporary))
            gather_objects(None)
            return
        self.continuation["loss_sums"] = gather_objects(self._tr_loss.item())
        self.continuation["logged_at"] = self._globalstep_last_logged
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError):  # safetensors and torch.save don't say why
            _check_room(Path(self.args.output_dir))
            raise
        self.saved_step = self.state.global_step
        gather_objects(None)  # every process has written its part
        if rank() == 0:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.saved_step}"
            files = sorted(file for file in folder.iterdir() if file.name not in (STATE, CHECKSUMS))
            write_json(folder / CHECKSUMS, {file.name: file_hash(file) for file in files})
            for old in _checkpoints(folder.parent)[:-KEPT_CHECKPOINTS]:
                _remove(old)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        # what Trainer needs to resume is model.safetensors; beside it goes what the other scripts load
        (Path(output_dir) / "training_args.bin").unlink(missing_ok=True)
        write_json(Path(output_dir) / CONTINUATION, self.continuation)
        module = self.accelerator.unwrap_model(self.model)
        save_projector(output_dir, module.projection.projector(), module.retriever, self.samer_config.merge)


def _start_worker(seeded: Callable[[int], None] | None, number: int) -> None:
    """A data loader's worker that takes SIGTERM from its trainer only, not from who stops the whole process group."""
    trainer = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
    if seeded is not None:
        seeded(number)


class Continuation(TrainerCallback):
    """What makes a resumed run end as an undisturbed one would.

    The mean loss goes on where the checkpoint left it, and a checkpoint knows whether its step is one to validate
    after: the last of an epoch, or of the run. After SIGTERM a run ends with a checkpoint of the step at work.
    """

    def __init__(self, trainer: SamerTrainer, checkpoint: Path | None) -> None:
        self.trainer, self.checkpoint = trainer, checkpoint
        self.stopped, self.steps_per_epoch = False, 1

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        self.steps_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        if self.checkpoint is not None:
            self.trainer.take_up_loss(read_json(self.checkpoint / CONTINUATION))

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        # accelerate does not reach the sampler of several processes behind the batches that a resumed epoch skips
        self.trainer.sampler.set_epoch(state.global_step // self.steps_per_epoch)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        epoch_ends = state.global_step % self.steps_per_epoch == 0 or state.global_step >= state.max_steps
        control.should_evaluate = bool(self.trainer.validation) and epoch_ends
        self.trainer.continuation["validates"] = control.should_evaluate
        if stop_asked():
            self.stopped = control.should_save = control.should_training_stop = True


class LineLogger(TrainerCallback):
    """One plain line per log on the first process: step, loss, rate, throughput, time left."""

    def __init__(self, captions_per_step: int) -> None:
        self.captions_per_step = captions_per_step
        self.started = self.first_step = 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.started, self.first_step = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        logs = logs or {}
        done = state.global_step - self.first_step
        if "loss" in logs and done:
            pace = (time.monotonic() - self.started) / done
            left = pace * (state.max_steps - state.global_step)
            words = [
                f"step {state.global_step}/{state.max_steps}",
                f"loss {logs['loss']:.4f}",
                f"lr {logs.get('learning_rate', 0):.2e}",
                f"{self.captions_per_step / pace:.1f} captions/s",
                f"{left / 60:.1f} min left",
            ]
            words += [f"{name} {logs[name]:.3f}" for name in ("object_mass_on_own", "entropy") if name in logs]
            print0(" | ".join(words))
        elif "eval_r@1" in logs:
            shown = ", ".join(f"{n} {logs[f'eval_{n}']:.1f}" for n in ("r@1", "r@5", "r@10"))
            print0(f"step {state.global_step}/{state.max_steps} | validation, box-free: {shown}")


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves: where, how many steps, seconds of training and the last validation metrics."""

    output_dir: Path
    steps: int
    seconds: float
    validation: dict[str, float]


def train(config: Config) -> TrainResult:
    """Trains the projector as configured and writes `projector.safetensors` + `config.json` to the output folder.

    Resumes from the last complete checkpoint in the output folder if `train.resume` is on.

    Raises:
        InputError: bad data, a folder that holds another run or is written to by another process, a full disk, a
            non-finite loss.
        Stopped: SIGTERM came; a checkpoint of the last step is written.
    """
    with only_writer(config.train.output_dir):
        return _train(config)


def _train(config: Config) -> TrainResult:
    settings = config.train
    output = Path(settings.output_dir)
    if not config.data.root:
        raise InputError("data.root is not set; give the Flickr30k-Entities folder as data.root=DIR (DATA_ROOT=DIR)")
    make_compressor(config.merge)  # an unknown name is refused before any work
    arguments = _arguments(config)
    _check_output(output, config)
    if settings.resume and (output / "history.json").is_file() and (output / "projector.safetensors").is_file():
        print0(f"{output} holds this run, finished; nothing is left to train")
        return _result(output, _history(output / "history.json"), settings, 0.0)
    reader = make_reader(config.data.reader)
    records = reader.load_split(
        config.data.root, config.data.train_split, boxes=True, limit_images=config.data.limit_train_images
    )
    validation = []
    if config.data.eval_split:
        validation = reader.load_split(
            config.data.root, config.data.eval_split, boxes=False, limit_images=config.data.limit_eval_images
        )
    dataset = CaptionDataset(records)
    retriever = open_encoder(
        config.model.name,
        arguments.device,
        features=config.data.features,
        dtype=torch.bfloat16 if settings.bf16 else torch.float32,
        local_files_only=config.model.local_files_only,
    )
    model = ProjectorModel(retriever, config.merge, settings.temperature, settings.gather_negatives, settings.budgets)
    trainable = sum(p.numel() for p in model.parameters())
    dropped = 5 * len(records) - len(dataset)
    print0(
        f"training {trainable:,} parameters of {config.model.name} on {len(dataset):,} captions of {len(records):,} "
        f"images ({dataset.boxless():,} captions name nothing boxed, {dropped:,} unrelated ones left out); "
        f"writing to {output}"
    )
    gather_objects(None)  # no process may still be looking for a run in this folder when the first one marks it
    if rank() == 0:
        for folder in _torn_checkpoints(output):
            print0(f"{folder} was cut short; removing it")
            _remove(folder)
        with atomic_path(output / "config.yaml") as temporary:
            temporary.write_text(dump_config(config), encoding="utf-8")
    trainer = SamerTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=validation or None,
        data_collator=Collator(retriever, config.objects),
        validation=validation,
        config=config,
        callbacks=[LineLogger(settings.train_batch_size * settings.grad_accum_steps * world_size())],
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = (_checkpoints(output) or [None])[-1] if settings.resume else None
    continuation = Continuation(trainer, checkpoint)
    trainer.add_callback(continuation)
    started = time.monotonic()
    if checkpoint is not None:
        trainer.state = _checked_state(checkpoint)
        gather_objects(None)  # every process has read it before the first one may change it
        trainer.make_up_for_validation(checkpoint)
    state = trainer.state
    ended = state.global_step >= state.max_steps or _is_stale(settings, state.log_history)
    if checkpoint is not None and ended:
        print0(f"{checkpoint} is the end of this run; nothing is left to train")
        trainer._load_from_checkpoint(str(checkpoint))
    else:
        if checkpoint is not None:
            print0(f"resuming from {checkpoint}")
        with stoppable():
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            except RuntimeError as error:
                if "DataLoader worker" in str(error):  # SIGTERM may reach one before `_start_worker` does
                    stop_here()
                raise
            finally:
                trainer.end_workers()
            if continuation.stopped:
                print0(f"stopped after step {trainer.state.global_step} with a checkpoint in {output}")
                raise Stopped
    seconds = time.monotonic() - started
    # Trainer's last entry tells the time and the loss since this start only
    history = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    history.append({"epoch": trainer.state.epoch, "step": trainer.state.global_step})
    if rank() == 0:
        best = load_projector(output / "best", retriever) if settings.select_best and validation else None
        save_projector(output, best or model.projection.projector(), retriever, config.merge)
        with atomic_path(output / "history.json") as temporary:
            # sorted, as checkpoints keep them
            temporary.write_text(json.dumps(history, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return _result(output, history, settings, seconds)


def _history(path: Path) -> list[dict]:
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


def _arguments(config: Config) -> TrainingArguments:
    settings = config.train
    # a batch of stored features is large and quick to read: few workers, none far ahead
    workers = min(settings.dataloader_num_workers, 2) if config.data.features else settings.dataloader_num_workers
    try:
        arguments = TrainingArguments(
            output_dir=settings.output_dir,
            run_name=settings.run_name,
            per_device_train_batch_size=settings.train_batch_size,
            per_device_eval_batch_size=settings.eval_batch_size,
            gradient_accumulation_steps=settings.grad_accum_steps,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            warmup_steps=settings.warmup_ratio,  # below 1 it is a share of all steps
            lr_scheduler_type="cosine",
            num_train_epochs=settings.num_train_epochs,
            max_grad_norm=settings.max_grad_norm,
            seed=settings.seed,
            data_seed=settings.seed,
            report_to=settings.report_to,
            dataloader_num_workers=workers,
            dataloader_persistent_workers=workers > 0,
            dataloader_prefetch_factor=1 if config.data.features and workers else None,
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_steps=settings.logging_steps,
            logging_nan_inf_filter=False,
            save_steps=settings.save_steps,
            eval_strategy="no",  # `Continuation` says when
            remove_unused_columns=False,
            disable_tqdm=True,
            # False would lay the gradients out anew after a start's first step, and sums of 3 round otherwise then
            ddp_find_unused_parameters=True,
            label_names=[],
            use_cpu=not torch.cuda.is_available(),  # else accelerate ignores torchrun on CPUs: each would train alone
        )
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()  # says what is not installed; Trainer would only ask after the model is loaded
    except (ImportError, RuntimeError, ValueError) as error:
        raise InputError(f"train settings: {' '.join(str(error).split())[:200]}") from None
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # without torchrun one GPU trains: DataParallel would cut our nested batches apart
    return arguments


def _numbered(output: Path) -> list[Path]:
    """Folders named as checkpoints are, in order of their steps."""
    number = lambda folder: folder.name.removeprefix("checkpoint-")
    found = [folder for folder in output.glob("checkpoint-*") if number(folder).isdecimal() and folder.is_dir()]
    return sorted(found, key=lambda folder: int(number(folder)))


def _checkpoints(output: Path) -> list[Path]:
    """Checkpoints that were written whole and are not being removed, oldest first."""
    return [folder for folder in _numbered(output) if (folder / CHECKSUMS).is_file()]


def _torn_checkpoints(output: Path) -> list[Path]:
    """Checkpoints of this run that were cut short while they were written or removed.

    Raises:
        InputError: whole ones that something else wrote.
    """
    torn = [folder for folder in _numbered(output) if folder not in _checkpoints(output)]
    for folder in torn:
        if not (output / "config.yaml").is_file() or (
            (folder / STATE).is_file() and not (folder / CONTINUATION).is_file()
        ):
            raise InputError(f"{folder} is no checkpoint of this run; name another train.output_dir, or remove it")
    return torn


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint; what a kill meanwhile leaves is not taken for whole, nor for something else's."""
    for name in (CHECKSUMS, STATE):
        (checkpoint / name).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def _checked_state(checkpoint: Path) -> TrainerState:
    """A checkpoint's state, if it is as it was written.

    Raises:
        InputError: names the file that is damaged.
    """
    remedy = f"remove {checkpoint.name} to go on from the one before"
    for name, checksum in read_json(checkpoint / CHECKSUMS).items():
        try:
            if not bare_name(name) or file_hash(checkpoint / name) != checksum:
                raise InputError(f"{checkpoint / name}: contents differ from {CHECKSUMS}; {remedy}")
        except OSError as error:
            raise InputError(f"{checkpoint / name}: not readable ({error.strerror}); {remedy}") from None
    try:
        state = TrainerState.load_from_json(str(checkpoint / STATE))
        right = f"checkpoint-{state.global_step}" == checkpoint.name and state.max_steps >= 1
        right = right and all(isinstance(entry["step"], int) for entry in state.log_history)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        right = False
    if not right:
        raise InputError(f"{checkpoint / STATE}: not what Trainer wrote; {remedy}")
    return state


def _check_room(folder: Path) -> None:
    """Raises InputError if a megabyte can't be written, as after a checkpoint that filled the disk."""
    try:
        with atomic_path(folder / "room") as temporary:
            temporary.write_bytes(bytes(2**20))
    except InputError as error:
        reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error
        raise InputError(
            f"{folder}: a checkpoint can't be written ({reason}); make room and run the same command again to go on"
        ) from None
    (folder / "room").unlink()


def _evaluations_since_best(history: list[dict]) -> int:
    """How many evaluations came after the best one, the first of equals; 0 also if there is none."""
    measured = [entry["eval_r@1"] for entry in history if "eval_r@1" in entry]
    return len(measured) - 1 - measured.index(max(measured)) if measured else 0


def _is_stale(settings: TrainConfig, history: list[dict]) -> bool:
    """Whether validation has not improved for too long."""
    patience = settings.early_stop_patience
    return patience is not None and _evaluations_since_best(history) >= patience


def _check_output(output: Path, config: Config) -> None:
    """Refuses a folder that holds a run with other settings; where training goes on must not change unseen."""
    previous = output / "config.yaml"
    if not previous.is_file():
        return
    old, new = load_config(previous), config
    if not config.train.resume:
        raise InputError(f"{output} holds a run and train.resume is false; name another train.output_dir or remove it")
    for section in ("model", "data", "merge", "objects", "train"):
        before, now = vars(getattr(old, section)), vars(getattr(new, section))
        for key, value in now.items():
            free = ("output_dir", "report_to", "run_name", "dataloader_num_workers", "eval_batch_size")
            if before[key] != value and key not in free:
                raise InputError(
                    f"{output} holds a run with {section}.{key}={before[key]!r}, now {value!r}; "
                    "name another train.output_dir, or remove it to start anew"
                )
