"""Aligns two frozen towers: trains the adapters and the projection of a tower retriever on pictures and captions.

    DIR/towers/                    the retriever without adapters, whose features the store holds
    DIR/features/                  that store (samer/features), if data.features names none
    DIR/epoch-00007.safetensors    while it runs, all that it needs to go on: the last two epochs and the best
    DIR/config.json, ...           the retriever, of the epoch with the best validation R@1; a finished run has it
    DIR/align.yaml, history.json   the settings as resolved; losses and metrics of every epoch

The towers' outputs are computed once and read from the store. A step takes whole images with all their captions, so
that an image goes through its adapter once for five captions. The loss is the mean of both directions' contrastive loss
on MaxSim scores, and a term that draws the words of a phrase to the patches in the phrase's boxes. All of this is ours.

Shape letters: B images of a process, I of all, N patches, C captions of a process, M tokens, D embedding, p phrases.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from samer import evaluation
from samer.config import DataConfig, InputError, MergeConfig, build_dataclass, load_yaml
from samer.data import make_reader
from samer.data.reader import split_part
from samer.data.records import ImageRecord
from samer.features.read import FeatureStore, open_encoder
from samer.features.towers import StoredTowers
from samer.features.write import write_features
from samer.grounding import PhraseIndex
from samer.losses import multi_positive_t2i_loss
from samer.retrievers.towers import (
    TowerConfig,
    TowerProcessor,
    TowerRetriever,
    load_towers,
    read_tower_config,
    without_adapters,
)
from samer.runtime.files import atomic_path, is_file, listing, only_writer, write_json
from samer.runtime.gather import gather_with_grad
from samer.runtime.processes import gather_objects, print0, rank, world_size
from samer.runtime.shards import finished_shard, load_header, load_shard, write_shard
from samer.runtime.signals import stop_here, stoppable
from samer.scoring import maxsim
from samer.tokens import QueryTokens
from samer.training.loop import cosine_share

HIDDEN = -1e4  # the score of a pair that fills up


@dataclass(frozen=True)
class AlignSettings:
    """How adapters and projection are trained.

    Attributes:
        output_dir: the retriever, and the files of the run.
        images_per_step: of all processes, each with all its captions.
        patches: of an image that a step looks at, drawn anew each time; 0: all.
        epochs, learning_rate, weight_decay, warmup_ratio, max_grad_norm, seed: of AdamW with a cosine.
        learn_temperature: train the temperature, from `towers.temperature` on.
        phrase_weight: of the term that draws phrases to their boxes; 0 needs no boxes.
        phrase_temperature: that its similarities are divided by.
        features_dtype: of the store of the towers' outputs, where it has to be made.
        batch_size: images, and captions, per forward pass of the towers.
    """

    output_dir: str = "checkpoints/towers"
    images_per_step: int = 64
    patches: int = 0
    epochs: int = 20
    learning_rate: float = 5e-4
    weight_decay: float = 0.05
    warmup_ratio: float = 0.05
    max_grad_norm: float = 1.0
    dropout: float = 0.1
    learn_temperature: bool = True
    phrase_weight: float = 0.2
    phrase_temperature: float = 0.1
    features_dtype: str = "float16"
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("images_per_step", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"align.{name} must be at least 1; it is {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm", "phrase_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"align.{name} must be a number above 0; it is {getattr(self, name)}")
        for name in ("patches", "weight_decay", "phrase_weight", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"align.{name} must be at least 0; it is {getattr(self, name)}")
        for name in ("warmup_ratio", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"align.{name} must be in [0, 1); it is {getattr(self, name)}")


@dataclass(frozen=True)
class AlignConfig:
    """Everything that one alignment needs; written to OUTPUT_DIR/align.yaml as resolved."""

    towers: TowerConfig = field(default_factory=TowerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    align: AlignSettings = field(default_factory=AlignSettings)


def align(config: AlignConfig, device: torch.device) -> Path:
    """Trains a tower retriever as configured, and writes it; an interrupted run goes on where it stopped.

    Returns:
        The retriever's folder.

    Raises:
        InputError: bad data, towers that can't be used, a folder that holds another run, too little disk, a loss that
            is not finite.
        Stopped: SIGTERM came; the epoch at hand is computed again.
    """
    with only_writer(config.align.output_dir), stoppable():
        return _align(config, device)


def _align(config: AlignConfig, device: torch.device) -> Path:
    output = Path(config.align.output_dir)
    if not config.data.root:
        raise InputError("data.root is not set; give the data set's folder as data.root=DIR (DATA_ROOT=DIR)")
    _check_output(output, config)
    if is_file(output / "config.json"):
        print0(f"{output} holds this retriever, finished; nothing is left to train")
        return output
    records, validation = _records(config)
    store = _tower_outputs(config, output, device)
    store.check_records([*records, *validation])
    towers = load_towers(config.towers)
    torch.manual_seed(config.align.seed)
    made = read_tower_config(output / "towers" / "config.json")
    hashes = {"vision_hash": made.vision_hash, "text_hash": made.text_hash}
    model = TowerRetriever(replace(config.towers, **hashes), *towers)
    processor = TowerProcessor.of_towers(model.config)
    encoder = StoredTowers(model, processor, str(output), store)
    if rank() == 0:
        with atomic_path(output / "align.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")
    run = Alignment(config, encoder, records, validation)
    run.to_the_end()
    if rank() == 0:
        run.load(run.best_file())
        write_json(output / "history.json", {"epochs": run.history})
        model.config = replace(model.config, temperature=float(run.temperature.detach()))
        model.save(output, processor)  # its config.json last: then the run is finished
        run.clear()
    gather_objects(None)
    return output


def _check_output(output: Path, config: AlignConfig) -> None:
    """Refuses a folder that holds an alignment with other settings."""
    if not is_file(output / "align.yaml"):
        if is_file(output / "config.json"):
            raise InputError(f"{output} holds another model; name another align.output_dir")
        return
    before = asdict(build_dataclass(AlignConfig, load_yaml(output / "align.yaml"), str(output / "align.yaml")))
    for section, values in asdict(config).items():
        for key, value in values.items():
            if before[section][key] != value and key not in ("output_dir", "batch_size", "features", "strict"):
                raise InputError(
                    f"{output} holds an alignment with {section}.{key}={before[section][key]!r}, now {value!r}; "
                    "name another align.output_dir, or remove it to start anew"
                )


def _records(config: AlignConfig) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """To train on, with boxes where the phrase term needs them, and to validate on."""
    data, reader = config.data, make_reader(config.data.reader)
    load = partial(reader.load_split, data.root, strict=data.strict)
    records = load(data.train_split, boxes=config.align.phrase_weight > 0, limit_images=data.limit_train_images)
    kept = [replace(each, captions=tuple(c for c in each.captions if c.related)) for each in records]
    kept = [record for record in kept if record.captions]
    if len(kept) < config.align.images_per_step:
        raise InputError(
            f"{len(kept):,} images with captions are fewer than align.images_per_step {config.align.images_per_step}; "
            "lower it"
        )
    if not data.eval_split:
        return kept, []
    return kept, load(data.eval_split, boxes=False, limit_images=data.limit_eval_images)


def _tower_outputs(config: AlignConfig, output: Path, device: torch.device) -> FeatureStore:
    """The store of what the towers give for both splits, computed where it is not there yet."""
    bare, data = output / "towers", config.data
    if rank() == 0 and not is_file(bare / "config.json"):
        without_adapters(config.towers, bare)
    gather_objects(None)
    if data.features:
        return FeatureStore(data.features, str(bare), device)
    splits = dict.fromkeys(split_part(split)[0] for split in (data.train_split, data.eval_split) if split)
    retriever = open_encoder(str(bare), device)
    print0(f"the towers' outputs are computed once, into {output / 'features'}")
    write_features(
        output / "features",
        data.root,
        list(splits),
        retriever,
        batch_size=config.align.batch_size,
        dtype=config.align.features_dtype,
        reader=data.reader,
        strict=data.strict,
    )
    return FeatureStore(output / "features", str(bare), device)


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
        self.log_temperature = nn.Parameter(torch.tensor([math.log(config.towers.temperature)], device=encoder.device))
        parts = {"vision": model.vision_adapter, "text": model.text_adapter, "projection": model.projection}
        self.parameters = {f"{name}.{key}": p for name, part in parts.items() for key, p in part.named_parameters()}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        groups = [
            {"params": [p for p in self.parameters.values() if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in self.parameters.values() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        if settings.learn_temperature:
            self.parameters["log_temperature"] = self.log_temperature
            groups[1]["params"].append(self.log_temperature)
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
        self.steps = len(records) // settings.images_per_step
        self.epoch, self.history = 0, []
        self.stamp = asdict(config)
        for key in ("output_dir", "batch_size"):
            del self.stamp["align"][key]
        del self.stamp["data"]["features"]
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
            losses = self.step([self.records[k] for k in order[start : start + share]], number)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value / self.steps
        for adapter in (self.encoder.model.vision_adapter, self.encoder.model.text_adapter):
            adapter.eval()
        return sums | {"temperature": float(self.temperature.detach())}

    def step(self, records: Sequence[ImageRecord], number: int) -> dict[str, float]:
        """One update by the images of all processes.

        Returns:
            The losses, by name.

        Raises:
            InputError: one is not finite.
        """
        losses = self.losses(records, number)
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

    def losses(self, records: Sequence[ImageRecord], number: int) -> dict[str, Tensor]:
        """The contrastive loss over the images and captions of all processes, and the phrase term of this process's.

        Args:
            records: of this process.
            number: of the step; draws the patches.
        """
        encoder, device = self.encoder, self.encoder.device
        texts = [caption.text for record in records for caption in record.captions]
        inputs, words = encoder.record_inputs(records), encoder.query_inputs(texts)
        states, chosen = encoder.tower_states(inputs), None
        if 0 < self.settings.patches < states.shape[1]:
            chosen = torch.randperm(states.shape[1], generator=self._random(number + 1))[: self.settings.patches]
            states = states[:, chosen.to(device)]
        project = lambda hidden: F.normalize(encoder.model.projection(hidden), dim=-1)
        images = project(encoder.model.vision_adapter(states))  # (B, N, D)
        mask = words["attention_mask"].bool().to(device)
        queries = project(encoder.model.text_adapter(encoder.tower_states(words), mask))  # (C, M, D)
        every = gather_with_grad(images)
        scores = maxsim(queries, every, mask)  # (C, I)
        counts = gather_objects(len(texts))
        filler = scores.new_full((max(counts) - len(texts), scores.shape[1]), HIDDEN)
        scores = gather_with_grad(torch.cat([scores, filler]))
        real = torch.cat([torch.arange(max(counts)) < count for count in counts]).to(device)
        owners = gather_objects([len(record.captions) for record in records])
        owner = torch.tensor([k for k, count in enumerate(c for part in owners for c in part) for _ in range(count)])
        positives = owner.to(device)[:, None] == torch.arange(scores.shape[1], device=device)
        scores = scores[real]
        forward = multi_positive_t2i_loss(scores, positives, self.temperature)
        backward = multi_positive_t2i_loss(scores.T, positives.T, self.temperature)
        losses = {"contrast": (forward + backward) / 2}
        if self.settings.phrase_weight > 0:
            found = QueryTokens(queries, mask, words["offsets"])
            total, count = self._phrases(records, found, images, encoder.image_layout(inputs).grid, chosen)
            losses["phrases"] = total * (world_size() / max(1, sum(gather_objects(count))))
        return losses

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
        similar = (own.tokens[image, token][:, None] * images[image]).sum(-1) / self.settings.phrase_temperature
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
            self.optimizer.state[parameter] = {"step": tensors[f"adamw.step.{name}"][0], **moments}
