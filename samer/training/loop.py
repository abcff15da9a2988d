"""Projector-only training, top to bottom: the frozen retriever feeds it, the merge shapes the loss, AdamW steps.

The retriever computes in bfloat16 where train.bf16 is on; projection, merge and scores are float32 always, so there is
nothing left for autocast. accelerate finds the device, wraps the model for several processes and talks to trackers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, send_to_device, set_seed

from samer import evaluation
from samer.compressors import make_compressor
from samer.config import Config, InputError, TrainConfig, dump_config
from samer.data import reader_of, training_records
from samer.data.records import ImageRecord, names_boxes
from samer.features.read import open_encoder
from samer.losses import midpoint_share
from samer.retrievers.banks import FILE as BANK
from samer.retrievers.banks import QueryStates, captions_of, query_states, save_bank
from samer.retrievers.base import Encoder
from samer.retrievers.projectors import load_projector, save_projector
from samer.runtime.files import atomic_path, is_file, only_writer, opened
from samer.runtime.processes import gather_objects, print0, rank, stop_asked, world_size
from samer.runtime.shards import unreadable
from samer.runtime.signals import Stopped, stop_here, stoppable
from samer.training import checkpoints
from samer.training.batches import CaptionDataset, Collator, StepBatches, end_workers, make_loader
from samer.training.checks import Start, check_output, check_trackers, find_start
from samer.training.model import ProjectorModel


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves: where, how many steps, seconds of training and the last validation metrics."""

    output_dir: Path
    steps: int
    seconds: float
    validation: dict[str, float]


@dataclass(frozen=True)
class Shared:
    """What many trainings have in common, opened once.

    Attributes:
        encoder: as `config.data` and `config.model` say; its projector is set to the base's.
        records: as `samer.data.training_records` gives them with boxes; the encoder has checked them.
    """

    encoder: Encoder
    records: Sequence[ImageRecord]


def train(config: Config, shared: Shared | None = None, told: Callable[[float], object] | None = None) -> TrainResult:
    """Trains the projector as configured and writes `projector.safetensors` + `config.json` to the output folder.

    Through a compressor with a query bank also `bank.safetensors`, of the final projector.

    Resumes from the last complete checkpoint in the output folder if `train.resume` is on, with as many captions a step
    as before whatever the number of processes.

    Args:
        config: of the run.
        shared: what the caller has opened; None: all is opened here.
        told: is given how many seconds the run will take, once, when that can be said.

    Raises:
        InputError: bad data, a folder that holds another run or is written to by another process, a full disk, a
            non-finite loss.
        Stopped: SIGTERM came; a checkpoint of the last step is written.
    """
    with only_writer(config.train.output_dir):
        return _train(config, shared, told)


def _train(config: Config, shared: Shared | None, told: Callable[[float], object] | None) -> TrainResult:
    settings, output = config.train, Path(config.train.output_dir)
    # all that a run needs is looked at before its first step, what is quick to find before the model is loaded
    if not config.data.root:
        raise InputError("data.root is not set; give the data set's folder as data.root=DIR (DATA_ROOT=DIR)")
    make_compressor(config.merge)
    trackers = check_trackers(settings.report_to)
    check_output(output, config)
    if settings.resume and is_file(output / "history.json") and is_file(output / "projector.safetensors"):
        print0(f"{output} holds this run, finished; nothing is left to train")
        return _result(output, _read_history(output / "history.json"), settings, 0.0)
    start = find_start(output, settings)
    records, validation = _load_data(config, shared)
    dataset = CaptionDataset(records)
    accelerator = _make_accelerator(output, trackers)
    retriever = _encoder_of(config, accelerator.device, shared, records, validation)
    set_seed(settings.seed)
    queries = _bank_tokens(config, retriever, records)
    model = ProjectorModel(
        retriever, config.merge, settings.temperature, settings.gather_negatives, settings.budgets, queries
    )
    dropped = sum(len(record.captions) for record in records) - len(dataset)
    print0(
        f"training {sum(p.numel() for p in model.parameters()):,} parameters of {config.model.name} on "
        f"{len(dataset):,} captions of {len(records):,} images ({dataset.boxless():,} captions name nothing boxed, "
        f"{dropped:,} unrelated ones left out); writing to {output}"
    )
    gather_objects(None)  # no process may still be looking for a run in this folder when the first one marks it
    if rank() == 0:
        for folder in checkpoints.torn(output):
            print0(f"{folder} was cut short; removing it")
            checkpoints.remove(folder)
        with atomic_path(output / "config.yaml") as temporary:
            temporary.write_text(dump_config(config), encoding="utf-8")
    run = Run(config, accelerator, model, dataset, validation, start)
    run.told = told
    began = time.monotonic()
    run.to_the_end()
    seconds = time.monotonic() - began
    history = [*run.state.history, {"epoch": run.state.epoch, "step": run.state.step}]
    if rank() == 0:
        best = load_projector(output / "best", retriever) if settings.select_best and validation else None
        projector = best or model.projection.projector()
        save_projector(output, projector, retriever, config.merge)
        if queries:
            save_bank(output / BANK, queries.bank(projector))
        with atomic_path(output / "history.json") as temporary:
            temporary.write_text(json.dumps(history, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return _result(output, history, settings, seconds)


def _encoder_of(
    config: Config,
    device: torch.device,
    shared: Shared | None,
    records: Sequence[ImageRecord],
    validation: Sequence[ImageRecord],
) -> Encoder:
    """The encoder with the base's projector, which has looked at all images."""
    if shared is not None:
        shared.encoder.use_projector(shared.encoder.base_projector)  # which tells the tokens of a query bank apart
        if validation:
            shared.encoder.check_records(validation)
        return shared.encoder
    retriever = open_encoder(
        config.model.name,
        device,
        features=config.data.features,
        dtype=torch.bfloat16 if config.train.bf16 else torch.float32,
        local_files_only=config.model.local_files_only,
        revision=config.model.revision,
        reduce=config.reduce,
    )
    if not config.data.features and config.reduce.method != "none" and not config.reduce.unmerge:
        raise InputError(
            f"reduce.method={config.reduce.method}: boxes become labels before the tower sees a picture; train from "
            "features that scripts/features.py made with it (data.features), or with reduce.unmerge=true"
        )
    retriever.check_records([*records, *validation])
    return retriever


def _bank_tokens(config: Config, retriever: Encoder, records: Sequence[ImageRecord]) -> QueryStates | None:
    """What the query bank is made of, where the compressor has one: the captions that are trained on."""
    if not make_compressor(config.merge).needs_queries:
        return None
    source = f"captions of {config.data.train_split} in {config.data.root}"
    found = query_states(retriever, captions_of(records), config.merge.bank_size, source, config.train.eval_batch_size)
    print0(f"query bank: {len(found.hidden):,} vectors of {found.origin.count:,} texts, {source}")
    return found


def _load_data(config: Config, shared: Shared | None) -> tuple[Sequence[ImageRecord], list[ImageRecord]]:
    """Records to train on, with boxes, and to validate on, without; the latter may be none."""
    data = config.data
    records = training_records(data, boxes=True) if shared is None else shared.records
    if not names_boxes(records) and not any(record.things for record in records):
        print0(f"note: {data.train_split} of {data.root} has no boxes: trained without object labels")
    if not data.eval_split:
        return records, []
    return records, reader_of(data).load_split(
        data.root, data.eval_split, boxes=False, limit_images=data.limit_eval_images, strict=data.strict
    )


def _make_accelerator(output: Path, trackers: list[str]) -> Accelerator:
    """This process's device, its part in a job of several, and the trackers."""
    return Accelerator(
        mixed_precision="no",  # whatever an environment variable says
        cpu=not torch.cuda.is_available(),  # else accelerate ignores torchrun on CPUs: each would train alone
        log_with=trackers or None,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "logs")),
        # False would lay the gradients out anew after a start's first step, and sums of 3 round otherwise then
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def cosine_share(step: int, warm: int, steps: int) -> float:
    """Share of the learning rate at update `step` (from 0): linear up over `warm` updates, then half a cosine to 0."""
    if step < warm:
        return step / warm
    return 0.5 * (1 + math.cos(math.pi * ((step - warm) / max(1, steps - warm))))


class Run:
    """One run: what trains, and where it stands (`state`). A step is `accumulation` batches of every process."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        model: ProjectorModel,
        dataset: CaptionDataset,
        validation: Sequence[ImageRecord],
        start: Start,
    ) -> None:
        settings = config.train
        self.config, self.settings, self.accelerator, self.validation = config, settings, accelerator, validation
        self.output = Path(settings.output_dir)
        self.batches = StepBatches(dataset, settings.seed, settings.train_batch_size)
        # a batch of stored features is large and quick to read: few workers, none far ahead
        workers, ahead = settings.dataloader_num_workers, None
        if config.data.features:
            workers, ahead = min(workers, 2), 1
        self.loader = make_loader(dataset, self.batches, Collator(model.retriever, config.objects), workers, ahead)
        self.steps_per_epoch = math.ceil(len(self.batches) / start.accumulation)
        max_steps = math.ceil(settings.num_train_epochs * self.steps_per_epoch)
        self.warm = math.ceil(settings.warmup_ratio * max_steps)
        self.module, self.model = model, accelerator.prepare_model(model)
        projection = dict(model.projection.named_parameters())
        groups = [
            {"params": [p for name, p in projection.items() if name != "bias"], "weight_decay": settings.weight_decay},
            {"params": [p for name, p in projection.items() if name == "bias"], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
        self.loss_sum = torch.zeros((), device=accelerator.device)  # of this process, since the last log
        self.saved_step = -1  # of the newest checkpoint
        self.told: Callable[[float], object] | None = None  # of the seconds of the whole run
        self.checkpoint = start.checkpoint
        now = {"max_steps": max_steps, "world_size": world_size(), "accumulation": start.accumulation}
        if start.state is not None and start.state.max_steps != max_steps:
            raise InputError(
                f"{start.checkpoint} is of a run of {start.state.max_steps} steps, today's data make {max_steps}; "
                "restore the captions that it was started with, or name another train.output_dir"
            )
        if start.state is None:
            captions = self.batches.together * start.accumulation
            self.state = checkpoints.State(step=0, epoch=0.0, seed=settings.seed, captions_per_step=captions, **now)
        else:
            self.state = replace(start.state, **now)
            self._load(start.checkpoint)

    def to_the_end(self) -> None:
        """All steps that are left.

        Raises:
            Stopped: SIGTERM came; a checkpoint of the step that was at work is written.
        """
        made_up = self.state.validates and not self.state.validated()  # the validation failed after this checkpoint
        if self.checkpoint is not None and self.ended() and not made_up:
            print0(f"{self.checkpoint} is the end of this run; nothing is left to train")
            return
        if self.checkpoint is not None:
            print0(f"resuming from {self.checkpoint}")
        self._start_trackers()
        self.began, self.first_step = time.monotonic(), self.state.step
        with stoppable():
            try:
                if made_up:
                    self.validate()
                while not self.ended():
                    self.epoch()
            except RuntimeError as error:
                if "DataLoader worker" in str(error):  # SIGTERM may reach one before it listens
                    stop_here()
                raise
            finally:
                end_workers(self.loader)
                for tracker in self.accelerator.trackers:
                    tracker.finish()

    def ended(self) -> bool:
        """Whether all steps are done, or validation has not improved for too long."""
        patience = self.settings.early_stop_patience
        stale = patience is not None and _evaluations_since_best(self.state.history) >= patience
        return stale or self.state.step >= self.state.max_steps

    def epoch(self) -> None:
        """The steps that are left of the epoch at hand, each followed by what is due after it."""
        number, done = divmod(self.state.step, self.steps_per_epoch)
        self.batches.begin(number, done * self.state.accumulation)
        batches = iter(self.loader)
        for step in range(done, self.steps_per_epoch):
            first = step * self.state.accumulation
            rows = [self.batches.rows(k) for k in range(first, min(first + self.state.accumulation, len(self.batches)))]
            rate, norm = self.step(islice(batches, len(rows)), rows)
            self.state.step += 1
            self.state.epoch = number + (step + 1) / self.steps_per_epoch
            stopped = stop_asked()
            self.state.validates = bool(self.validation) and (
                step + 1 == self.steps_per_epoch or self.state.step == self.state.max_steps
            )
            if self.state.step % self.settings.logging_steps == 0:
                self.log_loss(rate, norm)
            if self.state.validates:
                self.validate()
            if stopped or self.ended() or self.state.step % self.settings.save_steps == 0:
                self.save()
            if stopped:
                print0(f"stopped after step {self.state.step} with a checkpoint in {self.output}")
                raise Stopped
            if self.ended():
                return

    def step(self, batches: Iterator[dict], rows: Sequence[int]) -> tuple[float, float]:
        """One update by the mean loss over all captions of a step.

        Args:
            batches: of this process.
            rows: how many captions all processes together have in each.

        Returns:
            (learning rate, norm of the gradient before clipping).
        """
        number = self.state.step + 1
        self.module.diagnose = number % self.settings.logging_steps == 0
        if self.settings.mixup == "midpoint":
            self.module.mixup_share = midpoint_share(self.state.step / self.state.max_steps)
        for k, batch in enumerate(batches):
            gradients_meet = nullcontext() if k + 1 == len(rows) else self.accelerator.no_sync(self.model)
            with gradients_meet:
                loss = self.model(**send_to_device(batch, self.accelerator.device))["loss"]
                if not torch.isfinite(loss):
                    raise InputError(
                        f"the loss is {float(loss.detach())} at step {number}; start anew in another train.output_dir "
                        "with a lower train.learning_rate, or train.bf16=false"
                    )
                loss = loss / (sum(rows) / rows[k])
                loss.backward()  # accelerate's would scale it as its environment says
            self.loss_sum += loss.detach()
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        rate = self.settings.learning_rate * cosine_share(self.state.step, self.warm, self.state.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return rate, float(norm)

    # --- what is due after a step -----------------------------------------------------------------------------------

    def log_loss(self, rate: float, norm: float) -> None:
        """Logs the mean loss since the last log, over all processes, and says how far the run is."""
        total = torch.tensor(gather_objects(self.loss_sum.item())).mean().item()
        self.loss_sum.zero_()
        state = self.state
        values = {"loss": total / (state.step - state.logged_at), "grad_norm": norm, "learning_rate": rate}
        values |= self.module.diagnostics
        if self.module.mixup_share is not None:
            values["mixup_share"] = self.module.mixup_share
        state.logged_at = state.step
        self._record(values)
        pace = (time.monotonic() - self.began) / (state.step - self.first_step)
        if self.told is not None:
            self.told(pace * (state.max_steps - self.first_step))
            self.told = None
        words = [
            f"step {state.step}/{state.max_steps}",
            f"loss {values['loss']:.4f}",
            f"lr {rate:.2e}",
            f"{state.captions_per_step / pace:.1f} captions/s",
            f"{pace * (state.max_steps - state.step) / 60:.1f} min left",
        ]
        words += [f"{name} {values[name]:.3f}" for name in ("object_mass_on_own", "entropy") if name in values]
        print0(" | ".join(words))

    def validate(self) -> None:
        """Box-free retrieval metrics of the validation split, with a checkpoint before, which holds them afterwards.

        So a picture that can't be read does not cost the epoch. Keeps the projector of the best R@1 in best/.
        """
        self.save()
        retriever = self.module.retriever
        before, projector = retriever.current_projector(), self.module.projection.projector()
        bank = self.module.queries and self.module.queries.bank(projector)
        retriever.use_projector(projector)
        try:
            metrics = evaluation.evaluate_records(
                retriever, self.validation, self.module.merge, batch_size=self.settings.eval_batch_size, bank=bank
            )
        finally:
            retriever.use_projector(before)
        self._record({f"eval_{name}": value for name, value in metrics.items()})
        shown = ", ".join(f"{name} {metrics[name]:.1f}" for name in ("r@1", "r@5", "r@10"))
        print0(f"step {self.state.step}/{self.state.max_steps} | validation, box-free: {shown}")
        since = _evaluations_since_best(self.state.history)
        if self.settings.select_best and since == 0 and rank() == 0:
            save_projector(self.output / "best", self.module.projection.projector(), retriever, self.config.merge)
        if self.settings.early_stop_patience is not None and since >= self.settings.early_stop_patience:
            print0(f"validation R@1 has not improved in {since} evaluations; stopping")
        self.save()

    def _record(self, values: dict[str, float]) -> None:
        """Adds an entry to the history and tells the trackers."""
        self.state.history.append({**values, "epoch": self.state.epoch, "step": self.state.step})
        self.accelerator.log(values, step=self.state.step)

    def _start_trackers(self) -> None:
        settings = {
            f"{section}.{key}": value for section, part in asdict(self.config).items() for key, value in part.items()
        }
        plain = {key: value if isinstance(value, (bool, int, float)) else str(value) for key, value in settings.items()}
        try:
            self.accelerator.init_trackers("samer", plain, {"wandb": {"name": self.settings.run_name}})
        except Exception as error:  # each tracker has errors of its own: no login, no server
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"train.report_to={self.settings.report_to} can't be started ({reason})") from error

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes a checkpoint of this step; where there is one, only what was logged since is new."""
        state, again = self.state, self.saved_step == self.state.step
        if not again:
            state.loss_sums = gather_objects(self.loss_sum.item())
        if rank() == 0 and again:
            checkpoints.rewrite_state(self.output, state)
        elif rank() == 0:
            projector, retriever = self.module.projection.projector(), self.module.retriever
            checkpoints.write(self.output, state, self._tensors(), projector, retriever, self.config.merge)
        self.saved_step = state.step
        gather_objects(None)  # nobody goes on, or reads it, before it is there

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Projection, moments and random state; the latter is the same in every process."""
        tensors = {"random": torch.get_rng_state()}
        for name, parameter in self.module.projection.named_parameters():
            tensors[f"projection.{name}"] = parameter.detach().cpu()
            for part, value in self.optimizer.state[parameter].items():
                tensors[f"adamw.{name}.{part}"] = value.cpu()
        return tensors

    def _load(self, checkpoint: Path) -> None:
        """Goes on from the tensors of a checkpoint, and from the sums of losses in its state."""
        sums, device = self.state.loss_sums, self.accelerator.device
        self.loss_sum += sums[rank()] if len(sums) == world_size() else sum(sums) / len(sums)
        self.saved_step = self.state.step
        tensors = checkpoints.read_tensors(checkpoint)
        torch.set_rng_state(tensors["random"])
        for name, parameter in self.module.projection.named_parameters():
            with torch.no_grad():
                parameter.copy_(tensors[f"projection.{name}"])
            self.optimizer.state[parameter] = {
                part: tensors[f"adamw.{name}.{part}"].to(device) for part in ("step", "exp_avg", "exp_avg_sq")
            }


def _read_history(path: Path) -> list[dict]:
    try:
        with opened(path) as handle:
            history = json.loads(handle.read().decode("utf-8"))
        if not (isinstance(history, list) and all(isinstance(entry["step"], int) for entry in history) and history):
            raise ValueError("no list of steps")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise unreadable(path, error, "run the same command again to end this run") from None
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
