"""Projector-only training on transformers.Trainer: the frozen retriever feeds it, the merge shapes the loss.

Shape letters: B captions of this process, U distinct images, N tokens, K regions, D embedding, I images scored.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback, TrainerState

from samer import evaluation, flickr
from samer.colpali import Projector, Retriever, save_projector
from samer.config import Config, InputError, MergeConfig, dump_config, load_config
from samer.losses import multi_positive_t2i_loss
from samer.merging import merge_tokens
from samer.objects import object_diagnostics
from samer.runtime import atomic_path, gather_objects, gather_with_grad, print0, rank, read_json, world_size
from samer.scoring import maxsim
from samer.tokens import MergedTokens
from samer.train_data import CaptionDataset, Collator


class ProjectorModel(nn.Module):
    """The shared projection, the only thing that trains; the frozen retriever stands beside it, not in it."""

    accepts_loss_kwargs = False  # the loss is a mean over this batch; Trainer divides it by the accumulation steps

    def __init__(self, retriever: Retriever, merge: MergeConfig, temperature: float, gather_negatives: bool) -> None:
        super().__init__()
        self.embedding_proj_layer = nn.Linear(retriever.hidden_size, retriever.embedding_dim)
        with torch.no_grad():
            self.embedding_proj_layer.weight.copy_(retriever.base_projector.weight)
            self.embedding_proj_layer.bias.copy_(retriever.base_projector.bias)
        self.retriever = retriever  # no nn.Module: neither registered, nor trained, nor saved
        self.merge = merge
        self.temperature = temperature
        self.gather_negatives = gather_negatives
        self.diagnose = False
        self.diagnostics: dict[str, float] = {}

    def project(self, hidden: Tensor) -> Tensor:
        """Unit tokens (..., D) in float32, as `Retriever.project` computes them."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.normalize(self.embedding_proj_layer(hidden.float()), dim=-1)

    def projector(self) -> Projector:
        """The trained projection as float32 copies on the CPU."""
        layer = self.embedding_proj_layer
        return Projector(*(t.detach().float().cpu().clone() for t in (layer.weight, layer.bias)))

    def forward(
        self,
        image_inputs: dict[str, Tensor],
        query_inputs: dict[str, Tensor],
        image_of: Tensor,
        image_numbers: Tensor,
        labels: Tensor,
    ) -> dict[str, Tensor]:
        """The loss of METHOD section 4 for one `Collator` batch; each caption's image is merged with its own labels."""
        image_hidden = self.retriever.hidden_states(image_inputs)  # (U, N, H)
        query_hidden = self.retriever.hidden_states(query_inputs)  # (B, M, H)
        tokens = self.project(image_hidden)[image_of]  # (B, N, D)
        coords = self.retriever.image_coords(image_inputs["input_ids"])[0][image_of]
        mask = image_inputs["attention_mask"].bool()[image_of]
        mask = None if bool(mask.all()) else mask
        merged = merge_tokens(tokens, coords, self.merge, mask=mask, instance_labels=labels)
        if self.diagnose:
            self.diagnostics = _diagnostics(merged, tokens, coords, self.merge, mask, labels)
        images, regions, numbers = merged.tokens, merged.mask, image_numbers
        if self.gather_negatives:
            images, numbers = gather_with_grad(images), gather_with_grad(numbers)
            regions = gather_with_grad(regions.to(torch.uint8)).bool()
        scores = maxsim(self.project(query_hidden), images, query_inputs["attention_mask"].bool(), regions)  # (B, I)
        loss = multi_positive_t2i_loss(scores, image_numbers[:, None] == numbers[None], self.temperature)
        return {"loss": loss}


@torch.no_grad()
def _diagnostics(merged: MergedTokens, tokens: Tensor, coords: Tensor, merge: MergeConfig, mask, labels) -> dict:
    box_free = merge_tokens(tokens, coords, merge, mask=mask)
    values = object_diagnostics(merged, labels, mask=mask, box_free=box_free)
    means = {name: float(value.nanmean()) for name, value in values.items()}
    return {name: value for name, value in means.items() if math.isfinite(value)}  # no object in the whole batch: NaN


class SamerTrainer(Trainer):
    """Trainer that logs the object diagnostics, evaluates by retrieval and saves projectors."""

    def __init__(self, *args, validation: list[flickr.ImageRecord], config: Config, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.validation = validation
        self.samer_config = config

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
        """Box-free retrieval metrics on the validation split with the projector as it stands."""
        module = self.accelerator.unwrap_model(self.model)
        retriever = module.retriever
        before = retriever.current_projector()
        retriever.use_projector(module.projector())
        try:
            metrics = evaluation.evaluate_records(
                retriever, self.validation, module.merge, batch_size=self.args.eval_batch_size
            )
        finally:
            retriever.use_projector(before)
        values = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(values)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, values)
        return values

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        # what Trainer needs to resume is model.safetensors; beside it goes what the other scripts load
        (Path(output_dir) / "training_args.bin").unlink(missing_ok=True)
        module = self.accelerator.unwrap_model(self.model)
        save_projector(output_dir, module.projector(), module.retriever, self.samer_config.merge)


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
        InputError: bad data, a folder that holds another run, a non-finite loss.
    """
    settings = config.train
    output = Path(settings.output_dir)
    if not config.data.root:
        raise InputError("data.root is not set; give the Flickr30k-Entities folder as data.root=DIR (DATA_ROOT=DIR)")
    arguments = _arguments(config)
    _check_output(output, config)
    records = flickr.load_split(
        config.data.root, config.data.train_split, boxes=True, limit_images=config.data.limit_train_images
    )
    validation = []
    if config.data.eval_split:
        validation = flickr.load_split(
            config.data.root, config.data.eval_split, boxes=False, limit_images=config.data.limit_eval_images
        )
    dataset = CaptionDataset(records)
    retriever = Retriever.load(
        config.model.name,
        dtype=torch.bfloat16 if settings.bf16 else torch.float32,
        device=arguments.device,
        local_files_only=config.model.local_files_only,
    )
    model = ProjectorModel(retriever, config.merge, settings.temperature, settings.gather_negatives)
    trainable = sum(p.numel() for p in model.parameters())
    dropped = 5 * len(records) - len(dataset)
    print0(
        f"training {trainable:,} parameters of {config.model.name} on {len(dataset):,} captions of {len(records):,} "
        f"images ({dataset.boxless():,} captions name nothing boxed, {dropped:,} unrelated ones left out); "
        f"writing to {output}"
    )
    gather_objects(None)  # no process may still be looking for a run in this folder when the first one marks it
    if rank() == 0:
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
    checkpoint = _last_checkpoint(output) if settings.resume else None
    started = time.monotonic()
    if checkpoint is not None and _is_finished(checkpoint):
        print0(f"{checkpoint} is the end of this run; nothing is left to train")
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        trainer._load_from_checkpoint(str(checkpoint))
    else:
        if checkpoint is not None:
            print0(f"resuming from {checkpoint}")
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.monotonic() - started
    measured = [entry["step"] for entry in trainer.state.log_history if "eval_r@1" in entry]
    if validation and trainer.state.global_step not in measured:
        trainer.evaluate()  # the last checkpoint is older than the last evaluation: resuming from it skips that
    if rank() == 0:
        save_projector(output, model.projector(), retriever, config.merge)
        with atomic_path(output / "history.json") as temporary:
            temporary.write_text(json.dumps(trainer.state.log_history, indent=1) + "\n", encoding="utf-8")
    final = next((entry for entry in reversed(trainer.state.log_history) if "eval_r@1" in entry), {})
    metrics = {name.removeprefix("eval_"): value for name, value in final.items() if name.startswith("eval_")}
    return TrainResult(output, trainer.state.global_step, seconds, metrics)


def _arguments(config: Config) -> TrainingArguments:
    settings = config.train
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
            dataloader_num_workers=settings.dataloader_num_workers,
            dataloader_persistent_workers=settings.dataloader_num_workers > 0,
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_steps=settings.logging_steps,
            logging_nan_inf_filter=False,
            save_steps=settings.save_steps,
            save_total_limit=2,
            eval_strategy="epoch" if config.data.eval_split else "no",
            remove_unused_columns=False,
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
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


def _last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that was written whole: trainer_state.json is the last file of one."""
    found = []
    for folder in output.glob("checkpoint-*"):
        number = folder.name.removeprefix("checkpoint-")
        if number.isdigit() and (folder / "trainer_state.json").is_file():
            found.append((int(number), folder))
    return max(found)[1] if found else None


def _is_finished(checkpoint: Path) -> bool:
    state = read_json(checkpoint / "trainer_state.json")
    return state.get("global_step", 0) >= state.get("max_steps", 0)


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
