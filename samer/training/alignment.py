"""The run of an alignment: batches, losses, steps, checkpoints.

A step takes whole images with some of their captions and phrases, so that an image goes through its adapter once for
all of them. The loss is the mean of both directions' contrastive loss on MaxSim scores, and a term that draws the words
of a phrase to the patches in the phrase's boxes. All of this is ours.

Shape letters: B images of a process, I of all, N patches, C captions of a process, M tokens, D embedding, p phrases.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from samer import evaluation
from samer.config import InputError, MergeConfig
from samer.data.records import ImageRecord, phrase_texts
from samer.features.towers import StoredTowers
from samer.grounding import PhraseIndex
from samer.losses import multi_positive_t2i_loss
from samer.runtime.files import listing
from samer.runtime.gather import gather_with_grad
from samer.runtime.processes import gather_objects, print0, rank, world_size
from samer.runtime.shards import finished_shard, load_header, load_shard, write_shard
from samer.runtime.signals import stop_here
from samer.scoring import maxsim
from samer.tokens import QueryTokens
from samer.training.align_settings import AlignConfig
from samer.training.loop import cosine_share

FILLER = -1e4  # the score of a pair that fills up


def _of_all(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of all processes one after the other, and which of the rows are none that only fill up."""
    counts = gather_objects(len(scores))
    filler = scores.new_full((max(counts) - len(scores), scores.shape[1]), FILLER)
    real = torch.cat([torch.arange(max(counts)) < count for count in counts])
    return gather_with_grad(torch.cat([scores, filler])), real.to(scores.device)


class Alignment:
    """One run: what trains, and where it stands. An epoch sees every image once, but for what fills no step."""

    def __init__(
        self,
        config: AlignConfig,
        encoder: StoredTowers,
        records: Sequence[ImageRecord],
        validation: Sequence[ImageRecord],
    ) -> None:
        settings = config.align
        if settings.images_per_step % world_size():
            raise InputError(
                f"align.images_per_step {settings.images_per_step} is no multiple of the {world_size()} processes"
            )
        self.config, self.settings, self.output = config, settings, Path(settings.output_dir)
        self.encoder, self.records, self.validation = encoder, records, validation
        model = encoder.model
        self.log_temperature = nn.Parameter(torch.tensor([math.log(model.config.temperature)], device=encoder.device))
        parts = {"vision": model.vision_adapter, "text": model.text_adapter, "projection": model.projection}
        self.parameters = {f"{name}.{key}": p for name, part in parts.items() for key, p in part.named_parameters()}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        for module in (*model.vision_adapter.modules(), *model.text_adapter.modules()):
            if isinstance(module, nn.Dropout):
                module.p = settings.dropout
            elif isinstance(module, nn.MultiheadAttention):
                module.dropout = settings.dropout
        groups = [
            {"params": [p for p in self.parameters.values() if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in self.parameters.values() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        if settings.learn_temperature:
            self.parameters["log_temperature"] = self.log_temperature
            groups[1]["params"].append(self.log_temperature)
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
        self.asked = [phrase_texts([record]) for record in records] if settings.phrases else [[]] * len(records)
        self.steps = len(records) // settings.images_per_step
        self.epoch, self.history = 0, []
        self.stamp = asdict(config)
        for key in ("output_dir", "batch_size"):
            del self.stamp["align"][key]
        for key in ("features", "strict"):
            del self.stamp["data"][key]
        self.stamp["made"] = asdict(model.config)

    @property
    def temperature(self) -> Tensor:
        return self.log_temperature.exp()

    # --- the run ----------------------------------------------------------------------------------------------------

    def to_the_end(self) -> None:
        """All epochs that are left, each followed by a validation and a checkpoint."""
        files = self._files()
        if files:
            self.load(files[-1])
            print0(f"resuming after epoch {self.epoch}")
        trained = sum(p.numel() for p in self.parameters.values())
        print0(
            f"aligning {trained:,} parameters on {sum(len(r.captions) for r in self.records):,} captions of "
            f"{len(self.records):,} images, {self.settings.epochs} epochs of {self.steps} steps; "
            f"writing to {self.output}"
        )
        began, first = time.monotonic(), self.epoch
        while self.epoch < self.settings.epochs:
            values = self.train_epoch()
            self.epoch += 1
            values |= self.validate()
            self.history.append({"epoch": self.epoch, **values})
            self.save()
            left = (time.monotonic() - began) / (self.epoch - first) * (self.settings.epochs - self.epoch)
            shown = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
            print0(f"epoch {self.epoch}/{self.settings.epochs} | {shown} | about {left / 60:.0f} min left")

    def train_epoch(self) -> dict[str, float]:
        """One pass over the images.

        Returns:
            Mean losses of the epoch.
        """
        order = torch.randperm(len(self.records), generator=self._random(self.epoch)).tolist()
        share = self.settings.images_per_step // world_size()
        sums: dict[str, float] = {}
        for adapter in (self.encoder.model.vision_adapter, self.encoder.model.text_adapter):
            adapter.train()
        for step in range(self.steps):
            stop_here()
            start = step * self.settings.images_per_step + rank() * share
            number = self.epoch * self.steps + step
            torch.manual_seed(hash((self.settings.seed, number, rank())) % 2**63)  # dropout
            losses = self.step(order[start : start + share], number)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value / self.steps
        for adapter in (self.encoder.model.vision_adapter, self.encoder.model.text_adapter):
            adapter.eval()
        return sums | {"temperature": float(self.temperature.detach())}

    def step(self, images: Sequence[int], number: int) -> dict[str, float]:
        """One update by the images of all processes, of which `images` are this one's.

        Returns:
            The losses, by name.

        Raises:
            InputError: one is not finite.
        """
        losses = self.losses(images, number)
        total = losses["contrast"] + self.settings.phrase_weight * losses.get("phrases", 0.0)
        if not torch.isfinite(total):
            raise InputError(f"the loss is {float(total)} in epoch {self.epoch + 1}; lower align.learning_rate")
        self.optimizer.zero_grad()
        total.backward()
        parameters = list(self.parameters.values())
        if world_size() > 1:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size()
        nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm)
        steps = self.steps * self.settings.epochs
        warm = math.ceil(self.settings.warmup_ratio * steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * cosine_share(number, warm, steps)
        self.optimizer.step()
        return {name: float(value.detach()) for name, value in losses.items()}

    def losses(self, numbers: Sequence[int], step: int) -> dict[str, Tensor]:
        """The contrastive loss over the images and queries of all processes, and the phrase term of this process's.

        Args:
            numbers: of this process's images.
            step: draws captions, phrases and patches.
        """
        encoder, device = self.encoder, self.encoder.device
        records, asked = zip(*(self._some(number, step) for number in numbers))
        captions = [caption.text for record in records for caption in record.captions]
        inputs, words = encoder.record_inputs(records), encoder.query_inputs([*captions, *itertools.chain(*asked)])
        states, chosen = encoder.tower_states(inputs), None
        if 0 < self.settings.patches < states.shape[1]:
            chosen = torch.randperm(states.shape[1], generator=self._random(step + 1))[: self.settings.patches]
            states = states[:, chosen.to(device)]
        project = lambda hidden: F.normalize(encoder.model.projection(hidden), dim=-1)
        images = project(encoder.model.vision_adapter(states))  # (B, N, D)
        mask = words["attention_mask"].bool().to(device)
        queries = project(encoder.model.text_adapter(encoder.tower_states(words), mask))  # (C, M, D)
        seen = mask
        if self.settings.word_dropout:  # one of a query's tokens stays at least
            lot = torch.rand(mask.shape, device=device).masked_fill(~mask, -1)
            seen = mask & (lot > self.settings.word_dropout) | (lot == lot.amax(1, keepdim=True))
        scores, real = _of_all(maxsim(queries, gather_with_grad(images), seen))  # (queries of all, I)
        positives = self._positives(numbers, records, asked).to(device)
        forward = multi_positive_t2i_loss(scores[real], positives, self.temperature)
        described = positives.any(0)  # an image may have no query among those drawn
        backward = multi_positive_t2i_loss(scores[real].T[described], positives.T[described], self.temperature)
        losses = {"contrast": (forward + backward) / 2}
        if self.settings.phrase_weight > 0:
            own = slice(len(captions))
            found = QueryTokens(queries[own], mask[own], words["offsets"][own])
            total, count = self._phrases(records, found, images, encoder.image_layout(inputs).grid, chosen)
            losses["phrases"] = total * (world_size() / max(1, sum(gather_objects(count))))
        return losses

    def _positives(self, numbers: Sequence[int], records: Sequence[ImageRecord], asked: Sequence[list[str]]) -> Tensor:
        """Which images answer which queries, (queries of all processes, I) bool.

        A caption is answered by its image and those that its grades name, a phrase by every image that it is annotated
        in.
        """
        graded = [[{name for name, _ in caption.grades} for caption in record.captions] for record in records]
        ids = [record.image_id for record in records]
        parts = gather_objects((ids, graded, list(asked), [set(self.asked[number]) for number in numbers]))
        names = [name for ids, *_ in parts for name in ids]  # of all images
        held = [phrases for *_, each in parts for phrases in each]
        rows, first = [], 0
        for ids, graded, own, _ in parts:
            for place, captions in enumerate(graded, start=first):
                rows += [
                    torch.tensor([place == image or name in answers for image, name in enumerate(names)])
                    for answers in captions
                ]
            rows += [torch.tensor([phrase in each for each in held]) for phrases in own for phrase in phrases]
            first += len(ids)
        return torch.stack(rows)

    def _phrases(
        self, records: Sequence[ImageRecord], queries: QueryTokens, images: Tensor, grid: Tensor, chosen: Tensor | None
    ) -> tuple[Tensor, int]:
        """-log of the share that patches in a phrase's boxes have of a softmax over the image's patches.

        Returns:
            The sum over the words of all phrases with boxes, and how many words they are.
        """
        index = PhraseIndex(records, [queries])
        flat = [tokens[mask] for tokens, mask in zip(queries.tokens, queries.mask)]
        own = index.own_tokens(range(len(records)), flat)
        named = own.phrases >= 0  # (B, T)
        if not named.any():
            return images.sum() * 0, 0
        image, token = named.nonzero(as_tuple=True)
        covered = index.coverage(own.phrases[image, token].cpu(), grid.cpu()[image.cpu()], int(grid.prod(1).max()))
        covered = covered if chosen is None else covered[:, chosen]
        covered = covered.to(images.device)
        inside = covered.sum(1) > 0
        similar = (own.tokens @ images.transpose(1, 2))[image, token] / self.settings.phrase_temperature
        share = (similar.log_softmax(-1) + covered.clamp(min=1e-9).log()).logsumexp(-1)
        return -(share * inside).sum(), int(inside.sum())

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """R@1 and R@10 of the validation split with all tokens; none without a split."""
        if not self.validation:
            return {}
        self.encoder.use_projector(self.encoder.trained_projector())
        merge = MergeConfig(compressor="none")
        found = evaluation.evaluate_records(self.encoder, self.validation, merge, batch_size=self.settings.batch_size)
        return {f"val_{name}": found[name] for name in ("r@1", "r@10")}

    def _some(self, image: int, step: int) -> tuple[ImageRecord, list[str]]:
        """A training image with as many of its captions as a step takes, and as many of its phrases."""
        record, settings, random = self.records[image], self.settings, self._random(step * 8191 + image)
        drawn = torch.randperm(len(record.captions), generator=random)[: settings.captions or None]
        phrases = self.asked[image]
        some = torch.randperm(len(phrases), generator=random)[: settings.phrases]
        captions = tuple(record.captions[k] for k in sorted(drawn.tolist()))
        return replace(record, captions=captions), [phrases[k] for k in some.tolist()]

    def _random(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.settings.seed * 1_000_003 + number)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _file(self, epoch: int) -> Path:
        return self.output / f"epoch-{epoch:05d}.safetensors"

    def _files(self) -> list[Path]:
        """Checkpoints of this run that are whole, oldest first."""
        found = sorted(path for path in listing(self.output) if path.name.startswith("epoch-"))
        same = lambda stamp, wanted: {k: v for k, v in stamp.items() if k != "history"} == wanted
        return [path for path in found if finished_shard(path, json.loads(json.dumps(self.stamp)), same)]

    def best_file(self) -> Path:
        """The checkpoint of the epoch with the best validation R@1, the first of equals; else the last."""
        if not self.validation:
            return self._file(self.epoch)
        return self._file(max(self.history, key=lambda entry: entry["val_r@1"])["epoch"])

    def save(self) -> None:
        """Writes a checkpoint of this epoch; the last two and the best one are kept."""
        if rank() == 0:
            tensors = {}
            for name, parameter in self.parameters.items():
                tensors[name] = parameter.detach().cpu()
                for part, value in self.optimizer.state[parameter].items():
                    tensors[f"adamw.{part}.{name}"] = value.detach().cpu().reshape(value.shape or 1)
            write_shard(self._file(self.epoch), tensors, {**self.stamp, "history": self.history}, {"epoch": self.epoch})
            kept = {self._file(self.epoch), self._file(self.epoch - 1), self.best_file()}
            for path in listing(self.output):
                if path.name.startswith("epoch-") and path not in kept:
                    path.unlink()
        gather_objects(None)

    def clear(self) -> None:
        """Removes the checkpoints of a finished run."""
        for path in self._files():
            path.unlink()

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint."""
        tensors, _ = load_shard(path)
        self.history = load_header(path)["stamp"]["history"]
        self.epoch = len(self.history)
        for name, parameter in self.parameters.items():
            with torch.no_grad():
                parameter.copy_(tensors[name])
            moments = {part: tensors[f"adamw.{part}.{name}"].to(parameter) for part in ("exp_avg", "exp_avg_sq")}
            step = tensors[f"adamw.step.{name}"][0].to(parameter.device, torch.float32)  # where AdamW, fused, wants it
            self.optimizer.state[parameter] = {"step": step, **moments}
