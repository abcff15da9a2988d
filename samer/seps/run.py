"""The training of SEPS: batches, losses, steps, validation, checkpoints.

A step takes pairs of picture and caption. Each process scores its own captions against the pictures of all processes,
so several give the loss and the gradients of one with the whole batch. What is drawn for a pair (crop, words,
decisions) depends on the seed, the step and the pair's place in the whole batch; so a run that was stopped goes on as
if it had not been, and the number of processes changes nothing but the towers' dropout.

Shape letters: B pairs of this process, A of all, N tokens, d embedding."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from samer.config import InputError
from samer.data.records import ImageRecord
from samer.losses import alignment, first_rows, midpoint_mixup, midpoint_share, mixup_partners, uniformity
from samer.runtime.files import listing
from samer.runtime.gather import gather_with_grad
from samer.runtime.processes import gather_objects, print0, rank, stop_asked, world_size
from samer.runtime.progress import prefetched
from samer.runtime.shards import finished_shard, load_shard, write_shard
from samer.runtime.signals import Stopped, stop_here
from samer.seps import similarity
from samer.seps.data import SplitData
from samer.seps.evaluate import recalls, score_split, split_metrics
from samer.seps.head import Images, Texts
from samer.seps.inputs import LiveInputs, StoredInputs
from samer.seps.model import Seps, save_model
from samer.seps.selection import pooled
from samer.seps.settings import SepsConfig

FREE = {
    "train": ("output_dir", "report_to", "save_steps", "eval_batch_size", "eval_block"),
    "data": ("workers", "strict"),
}  # settings that change no result


class SepsRun:
    """One run: what trains, and where it stands."""

    def __init__(
        self,
        config: SepsConfig,
        model: Seps,
        inputs: LiveInputs | StoredInputs,
        train: SplitData,
        validation: SplitData | None,
        tracker: Any = None,
    ) -> None:
        """`tracker`: of accelerate, or None.

        Raises:
            InputError: fewer captions than a step takes.
        """
        self.config, self.settings, self.output = config, config.train, Path(config.train.output_dir)
        self.model, self.inputs, self.train, self.validation = model, inputs, train, validation
        self.tracker = tracker
        self.pairs = train.pairs()
        self.whole = self.settings.batch_size * world_size()
        self.steps = len(self.pairs) // self.whole  # of an epoch; what fills no step is left out
        if not self.steps:
            raise InputError(f"{len(self.pairs):,} captions fill no step of {self.whole}; lower train.batch_size")
        self.parameters = model.trained()
        towers = {id(parameter) for parameter in model.towers()}
        parts = [[p for p in self.parameters.values() if (id(p) in towers) == of_towers] for of_towers in (False, True)]
        groups = [
            {"params": part, "share": share} for part, share in zip(parts, (1.0, self.settings.tower_rate)) if part
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay
        )
        self.step, self.history, self.sums = 0, [], {}
        self.saved = -1
        self.stamp = json.loads(json.dumps(result_settings(config) | {"captions_per_step": self.whole}))

    @property
    def epoch(self) -> int:
        return self.step // self.steps

    # --- the run ----------------------------------------------------------------------------------------------------

    def to_the_end(self) -> None:
        """All steps that are left; after each epoch a validation and a checkpoint.

        Raises:
            InputError: a loss that is not finite.
            Stopped: SIGTERM came; a checkpoint of the last step is written.
        """
        if files := self._files():
            self.load(files[-1])
            print0(f"resuming after step {self.step:,}, in epoch {min(self.epoch + 1, self.settings.epochs)}")
        last = self.steps * self.settings.epochs
        print0(
            f"training {sum(p.numel() for p in self.parameters.values()):,} parameters on {len(self.pairs):,} captions "
            f"of {len(self.train.records):,} images, {self.settings.epochs} epochs of {self.steps:,} steps; writing to "
            f"{self.output}"
        )
        if self.step and self.step % self.steps == 0 and len(self.history) < self.epoch:
            self.end_epoch()
        began, first = time.monotonic(), self.step
        for number, batch in prefetched(self.batch, range(self.step, last)):
            if stop_asked():
                self.save()
                stop_here()
                raise Stopped
            for name, value in self.update(batch, number).items():
                self.sums[name] = self.sums.get(name, 0.0) + value / self.steps
            self.step += 1
            if self.step % self.steps == 0:
                self.end_epoch()
                left = (time.monotonic() - began) / (self.step - first) * (last - self.step)
                print0(f"epoch {self.epoch}/{self.settings.epochs} | {self._shown()} | about {left / 60:.0f} min left")
            elif self.settings.save_steps and self.step % self.settings.save_steps == 0:
                self.save()

    def _shown(self) -> str:
        return ", ".join(f"{name} {value:.3g}" for name, value in self.history[-1].items() if name != "epoch")

    def end_epoch(self) -> None:
        """Checkpoint, validation, and the model where it is the best so far."""
        self.save()  # a picture that can't be read does not cost the epoch
        values = dict(self.sums) | self.validate()
        self.history.append({"epoch": self.epoch, **values})
        if rank() == 0 and best_epoch(self.history) == self.epoch:
            save_model(self.output, self.model, self.inputs)
        self.sums, self.saved = {}, -1
        self.save()
        if self.tracker is not None:
            self.tracker.log(values, step=self.step)

    def validate(self) -> dict[str, float]:
        """Recalls of the validation split in both directions; none without a split."""
        if self.validation is None:
            return {}
        self.model.eval()
        blocks = {"batch_size": self.settings.eval_batch_size, "block": self.settings.eval_block}
        scores, _ = score_split(self.model, self.inputs, self.validation, **blocks)
        image_of = torch.tensor([k for k, r in enumerate(self.validation.records) for _ in r.captions])
        return {f"val_{name}": value for name, value in recalls(split_metrics(scores, image_of)).items()}

    # --- a step -----------------------------------------------------------------------------------------------------

    def batch(self, number: int) -> dict[str, Any]:
        """What this process's pairs of a step give the towers."""
        epoch, step = divmod(number, self.steps)
        order = torch.randperm(len(self.pairs), generator=self._random(epoch)).tolist()
        start = step * self.whole + rank() * self.settings.batch_size
        places = range(start, start + self.settings.batch_size)
        pairs = [self.pairs[order[place]] for place in places]
        records: list[ImageRecord] = [self.train.records[record] for record, _ in pairs]
        lots = lambda kind: [random.Random(f"{self.settings.seed} {epoch} {place} {kind}") for place in places]
        found = {
            "pictures": self.inputs.pictures(records, lots("picture")),
            "texts": self.inputs.texts([self.train.records[r].captions[c].text for r, c in pairs], lots("text")),
            "images": torch.tensor([record for record, _ in pairs]),
            "place": start - step * self.whole,
        }
        if self.config.seps.dense != "none":
            found["dense"] = self.inputs.texts([self.train.dense[r.image_id] for r in records], lots("dense"))
        return found

    def update(self, batch: dict[str, Any], number: int) -> dict[str, float]:
        """One update by the pairs of all processes, of which the batch has this one's.

        Returns:
            The losses, by name.

        Raises:
            InputError: their sum is not finite, unless `nan_as_zero`: then nothing is updated.
        """
        self.model.train()
        torch.manual_seed(hash((self.settings.seed, number, rank())) % 2**63)  # dropout
        losses = self.losses(batch, number)
        warming = self.settings.warmup and number < self.steps
        total = losses["hinge"] * (number / self.steps if warming else 1.0)
        total = total + self.config.seps.weight_of_ratio * losses["ratio"]
        shown = {name: float(value.detach()) for name, value in losses.items()}
        if not math.isfinite(float(total.detach())):
            if self.settings.nan_as_zero:
                return dict.fromkeys(shown, 0.0)
            raise InputError(
                f"the loss is {float(total.detach())} at step {number + 1}; lower train.learning_rate, or look for "
                "broken pictures"
            )
        self.optimizer.zero_grad()
        total.backward()
        self.share_gradients()
        nn.utils.clip_grad_norm_(list(self.parameters.values()), self.settings.max_grad_norm)
        past = sum(number // self.steps >= epoch for epoch in self.settings.decay_epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * group["share"] * self.settings.decay**past
        self.optimizer.step()
        return shown

    def share_gradients(self) -> None:
        """Means of the gradients of all processes; parameters without one have none in any process."""
        if world_size() == 1:
            return
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size()

    def losses(self, batch: dict[str, Any], number: int) -> dict[str, Tensor]:
        """The losses over the pairs of all processes, the same in each of them, and what is logged beside them."""
        images, texts = self.model.encode_images(batch["pictures"]), self.model.encode_texts(batch["texts"])
        mode = self.config.seps.dense
        if mode != "none":
            dense = self.model.encode_texts(batch["dense"])
            if mode == "image":
                images = replace(images, guide=pooled(dense.tokens, dense.mask))
            else:
                texts = replace(texts, dense=dense, dense_of=torch.arange(len(dense.tokens), device=self.model.device))
        numbers = gather_with_grad(batch["images"].to(self.model.device))
        parts = [each if each is None else gather_with_grad(each) for each in (images.tokens, images.cls, images.guide)]
        if self.model.head.draws:
            texts = replace(texts, noise=self.noise(number, batch["place"], texts, parts[0]))
        spread = self.spread(Images(*parts), texts, numbers)
        if self.settings.mixup == "midpoint":
            parts[:2] = self.mixed(parts[:2], numbers, number)
        scores, shares = self.model.head(Images(*parts), texts)
        scores, shares = gather_with_grad(scores), gather_with_grad(shares)
        hardest = number >= self.steps * self.settings.sum_epochs
        align = similarity.alignment_loss(scores, numbers, self.config.seps.margin, hardest=hardest)
        return {"hinge": align, "ratio": similarity.ratio_loss(shares, self.config.seps.sparse_ratio), **spread}

    def mixed(self, parts: list[Tensor | None], numbers: Tensor, number: int) -> list[Tensor | None]:
        """Tokens (A, N, d) and [CLS] (A, d) of all pictures on their way to others', as long as they were."""
        share = midpoint_share(number / (self.steps * self.settings.epochs))
        partners = mixup_partners(numbers)
        towards = lambda own: own.norm(dim=-1, keepdim=True) * midpoint_mixup(F.normalize(own, dim=-1), partners, share)
        return [part if part is None else towards(part) for part in parts]

    @torch.no_grad()
    def spread(self, images: Images, texts: Texts, numbers: Tensor) -> dict[str, Tensor]:
        """Alignment of the captions' means with their pictures', and uniformity of the pictures'."""
        words = F.normalize(pooled(texts.tokens, texts.mask), dim=-1)
        pictures = F.normalize(pooled(images.tokens), dim=-1)
        positives = torch.eye(len(pictures), dtype=torch.bool, device=pictures.device)
        words = gather_with_grad(words)
        return {
            "alignment": alignment(words, pictures, positives),
            "uniformity": uniformity(pictures[first_rows(numbers)]),
        }

    def noise(self, number: int, place: int, texts: Texts, tokens: Tensor) -> Tensor:
        """Logistic noise (2, B, A, N), of each text by its place in the whole batch."""
        rows = []
        for k in range(place, place + len(texts.tokens)):
            lot = self._random((number + 1) * 65_537 + k)
            rows.append(torch.rand(2, len(tokens), tokens.shape[1], generator=lot).clamp(1e-6, 1 - 1e-6))
        return torch.logit(torch.stack(rows, 1)).to(tokens.device)

    def _random(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.settings.seed * 1_000_000_007 + number)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _file(self, step: int) -> Path:
        return self.output / f"checkpoint-{step:08d}.safetensors"

    def _files(self) -> list[Path]:
        """Checkpoints of this run that are whole, oldest first."""
        found = sorted(path for path in listing(self.output) if path.name.startswith("checkpoint-"))
        same = lambda stamp, wanted: stamp["settings"] == wanted
        return [path for path in found if finished_shard(path, self.stamp, same)]

    def save(self) -> None:
        """Writes a checkpoint of this step, unless it is there; the last two are kept."""
        if rank() == 0 and self.saved != self.step:
            tensors = {}
            for name, parameter in self.parameters.items():
                tensors[name] = parameter.detach().cpu()
                for part, value in self.optimizer.state.get(parameter, {}).items():
                    tensors[f"adamw.{part}.{name}"] = value.detach().cpu().reshape(value.shape or 1)
            stamp = {"settings": self.stamp, "history": self.history, "sums": self.sums}
            write_shard(self._file(self.step), tensors, stamp, {"step": self.step})
            for path in [p for p in listing(self.output) if p.name.startswith("checkpoint-")][:-2]:
                path.unlink()
        self.saved = self.step
        gather_objects(None)

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint."""
        tensors, header = load_shard(path)
        self.step = self.saved = header["entry"]["step"]
        self.history, self.sums = header["stamp"]["history"], header["stamp"]["sums"]
        for name, parameter in self.parameters.items():
            with torch.no_grad():
                parameter.copy_(tensors[name])
            moments = {part: tensors.get(f"adamw.{part}.{name}") for part in ("step", "exp_avg", "exp_avg_sq")}
            if moments["step"] is not None:
                values = {part: moments[part].to(parameter) for part in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": moments["step"][0], **values}

    def clear(self) -> None:
        """Removes the checkpoints of a finished run."""
        for path in listing(self.output):
            if path.name.startswith("checkpoint-"):
                path.unlink()


def best_epoch(history: Sequence[dict]) -> int:
    """The epoch with the greatest rSum on the validation split, the first of equals; without one the last."""
    if "val_rsum" not in history[-1]:
        return history[-1]["epoch"]
    return max(history, key=lambda entry: entry["val_rsum"])["epoch"]


def result_settings(config: SepsConfig) -> dict:
    """The settings that change a result, by section."""
    return {
        section: {key: value for key, value in values.items() if key not in FREE.get(section, ())}
        for section, values in asdict(config).items()
    }
