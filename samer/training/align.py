"""Aligns two frozen towers: trains the adapters and the projection of a tower retriever on pictures and captions.

    DIR/towers/                    the retriever without adapters, whose features the store holds
    DIR/features/                  that store (samer/features), if data.features names none
    DIR/epoch-00007.safetensors    while it runs, all that it needs to go on: the last two epochs and the best
    DIR/config.json, ...           the retriever, of the epoch with the best validation R@1; a finished run has it
    DIR/align.yaml, history.json   the settings as resolved; losses and metrics of every epoch

The towers' outputs are computed once and read from the store; what is trained on them, `samer.training.alignment` says.
"""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path

import torch
import yaml

from samer.config import InputError
from samer.data import reader_of, training_records
from samer.data.parts import split_part
from samer.data.records import ImageRecord, phrase_texts
from samer.features.read import FeatureStore, open_encoder
from samer.features.towers import StoredTowers, check_whole
from samer.features.write import write_features
from samer.retrievers.pretrained import TowerConfig, load_towers, read_tower_config, tower_hash
from samer.retrievers.towers import TowerProcessor, TowerRetriever, without_adapters
from samer.runtime.files import atomic_path, is_dir, is_file, listing, only_writer, write_json
from samer.runtime.processes import gather_objects, print0, rank
from samer.runtime.signals import stoppable
from samer.settings import build_dataclass, load_yaml
from samer.training.align_settings import AlignConfig
from samer.training.alignment import Alignment


def align(config: AlignConfig, device: torch.device, dtype: torch.dtype | None = None) -> Path:
    """Trains a tower retriever as configured, and writes it; an interrupted run goes on where it stopped.

    Args:
        config: what to train.
        device: to compute on.
        dtype: that the towers compute in; None: as `open_encoder` chooses.

    Returns:
        The retriever's folder.

    Raises:
        InputError: bad data, towers that can't be used, a folder that holds another run, too little disk, a loss that
            is not finite.
        Stopped: SIGTERM came; the epoch at hand is computed again.
    """
    with only_writer(config.align.output_dir), stoppable():
        return _align(config, device, dtype)


def _align(config: AlignConfig, device: torch.device, dtype: torch.dtype | None) -> Path:
    output = Path(config.align.output_dir)
    towers = {kind: _place(getattr(config.towers, kind)) for kind in ("vision", "text")}
    config = replace(config, towers=replace(config.towers, **towers))
    if not config.data.root:
        raise InputError("data.root is not set; give the data set's folder as data.root=DIR (DATA_ROOT=DIR)")
    _check_output(output, config)
    if is_file(output / "config.json"):
        for left in listing(output) if rank() == 0 else ():  # of a run that was killed in its last moment
            if left.name.startswith("epoch-"):
                left.unlink()
        print0(f"{output} holds this retriever, finished; nothing is left to train")
        return output
    records, validation = _records(config)
    store = _tower_outputs(config, output, device, dtype)
    store.check_records([*records, *validation])
    if lacking := store.lacking(phrase_texts(records)) if config.align.phrases else []:
        raise InputError(
            f"{store.folder}: no features of {len(lacking):,} phrases, first {lacking[0]!r}; compute them with "
            "scripts/features.py --phrases, or set align.phrases=0"
        )
    towers = load_towers(config.towers)
    torch.manual_seed(config.align.seed)
    made = read_tower_config(output / "towers" / "config.json")
    same = {name: getattr(made, name) for name in ("vision_hash", "text_hash", "max_text_tokens")}
    model = TowerRetriever(replace(config.towers, **same), *towers)
    if config.align.start:
        model.start_from(config.align.start)
    processor = TowerProcessor.of_towers(model.config)
    encoder = StoredTowers(model, processor, str(output), store)
    if rank() == 0:
        with atomic_path(output / "align.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")
    run = Alignment(config, encoder, records, validation)
    run.to_the_end()
    if rank() == 0:
        write_json(output / "history.json", {"epochs": run.history})
        run.load(run.best_file())
        model.config = replace(model.config, temperature=float(run.temperature.detach()))
        model.save(output, processor)  # its config.json last: then the run is finished
        run.clear()
    gather_objects(None)
    return output


def _place(name: str) -> str:
    """A folder's real path, so that the retriever is used from anywhere; a hub id as it is."""
    folder = os.path.expanduser(name)
    return os.path.realpath(folder) if is_dir(folder) else name


def _check_output(output: Path, config: AlignConfig) -> None:
    """Refuses a folder that holds an alignment with other settings."""
    if not is_file(output / "align.yaml"):
        if is_file(output / "config.json"):
            raise InputError(f"{output} holds another model; name another align.output_dir")
        return
    before = asdict(build_dataclass(AlignConfig, load_yaml(output / "align.yaml"), str(output / "align.yaml")))
    for section, values in asdict(config).items():
        for key, value in values.items():
            if (section, key) == ("data", "name") and "" in (before[section][key], value):
                continue  # one of them is guessed from the same folder
            if before[section][key] != value and key not in ("output_dir", "batch_size", "features", "strict"):
                raise InputError(
                    f"{output} holds an alignment with {section}.{key}={before[section][key]!r}, now {value!r}; "
                    "name another align.output_dir, or remove it to start anew"
                )


def _records(config: AlignConfig) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """To train on, with boxes where the phrase term needs them, and to validate on."""
    data = config.data
    boxes = config.align.phrase_weight > 0 or config.align.phrases > 0
    records = training_records(data, boxes=boxes)
    kept = [replace(each, captions=tuple(c for c in each.captions if c.related)) for each in records]
    kept = [record for record in kept if record.captions]
    if len(kept) < config.align.images_per_step:
        raise InputError(
            f"{len(kept):,} images with captions are fewer than align.images_per_step {config.align.images_per_step}; "
            "lower it"
        )
    if not data.eval_split:
        return kept, []
    return kept, reader_of(data).load_split(
        data.root, data.eval_split, boxes=False, limit_images=data.limit_eval_images, strict=data.strict
    )


def _check_towers(output: Path, made: TowerConfig, asked: TowerConfig) -> None:
    """Refuses a folder whose outputs are of other towers, or of pictures of another size."""
    differs = [] if made.image_size == asked.image_size else ["image_size"]
    differs += ["max_text_tokens"] if made.max_text_tokens > asked.max_text_tokens else []
    for kind in ("vision", "text"):
        now = tower_hash(getattr(asked, kind), getattr(asked, f"{kind}_revision"))
        if now != getattr(made, f"{kind}_hash") if now else getattr(asked, kind) != getattr(made, kind):
            differs.append(kind)
    if differs:
        name = differs[0]
        raise InputError(
            f"{output / 'towers'} was made with towers.{name}={getattr(made, name)!r}, now {getattr(asked, name)!r} or "
            "other files; name another align.output_dir, or remove it to start anew"
        )


def _tower_outputs(
    config: AlignConfig, output: Path, device: torch.device, dtype: torch.dtype | None = None
) -> FeatureStore:
    """The store of what the towers give for both splits, computed where it is not there yet."""
    bare, data = output / "towers", config.data
    if rank() == 0 and not is_file(bare / "config.json"):
        without_adapters(config.towers, bare)
    gather_objects(None)
    _check_towers(output, read_tower_config(bare / "config.json"), config.towers)
    if data.features:
        store = FeatureStore(data.features, str(bare), device)
        check_whole(store)
        return store
    splits = dict.fromkeys(split_part(split)[0] for split in (data.train_split, data.eval_split) if split)
    retriever = open_encoder(str(bare), device, dtype=dtype)
    print0(f"the towers' outputs are computed once, into {output / 'features'}")
    write_features(
        output / "features",
        data.root,
        list(splits),
        retriever,
        batch_size=config.align.batch_size,
        dtype=config.align.features_dtype,
        reader=data.name,
        strict=data.strict,
        phrases=config.align.phrases > 0,
    )
    return FeatureStore(output / "features", str(bare), device)
