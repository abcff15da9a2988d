"""What an index is made by: what a command line says, and what an index that is there says for itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from samer.compressors import settings_used
from samer.config import Config, InputError, ModelConfig, ReduceConfig, load_config
from samer.features.read import open_encoder
from samer.index.codes import refuse_new_codes
from samer.index.manifest import FLOATS, NO_REGION, read_index_manifest, write_index_manifest
from samer.index.read import Index
from samer.reducers import settings_used as reduction_used
from samer.reducers.calibration import with_statistics
from samer.retrievers.base import Encoder, Projector
from samer.retrievers.hf import COMPILED, identify
from samer.retrievers.identity import model_folder
from samer.retrievers.projectors import load_projector
from samer.runtime.files import exists, is_file, lookup, only_writer, read_json
from samer.runtime.hub import model_name, projector_place
from samer.runtime.processes import gather_objects, rank
from samer.settings import load_yaml, vectors_of

FARTHEST = (
    "clusters start from tokens far apart (merge.center_init=farthest): with an untouched projector that found 54 % "
    "first instead of 44 % on the generated scenes, 7.3 instead of 6.2 % on collages, as much on photographs; "
    "merge.center_init=raster starts as published"
)
MANY_TOKENS = 2000  # no image of the retrievers here has more: as they were trained, or by a limit of ours (NeoMME)
TOO_MANY = f"which region each patch went to is not kept: that takes a byte, so at most {NO_REGION} regions"


@dataclass(frozen=True)
class Asked:
    """What a command line says of an index; empty or None where it says nothing.

    Attributes:
        adapter_path: a trained projector's folder, file or hub id.
        config: a YAML file.
        overrides: `section.key=value`.
        dtype: of the stored vectors; a launcher passes an empty one on.
        assignments: whether the region of every patch is kept.
        computed_in: the dtype that the backbone computes in.
        also_computed_in: likewise, and an index of another one may hold both from now on.
    """

    adapter_path: str = ""
    config: str | None = None
    overrides: Sequence[str] = ()
    dtype: str | None = None
    assignments: bool | None = None
    computed_in: str | None = None
    also_computed_in: str | None = None

    def keys(self) -> set[str]:
        """The settings that are said, as `section.key`."""
        file = load_yaml(self.config) if self.config else None
        sections = {name: inner for name, inner in (file or {}).items() if isinstance(inner, dict)}
        inside = {f"{section}.{name}" for section, inner in sections.items() for name in inner}
        return inside | {override.partition("=")[0] for override in self.overrides}


@dataclass(frozen=True)
class Settings:
    """What an index is made by, or goes on with.

    Attributes:
        folder: the index.
        config: with the model and the merge.
        adapter_path: as asked for.
        dtype, assignments: of what is stored.
        index: as it is now; None where there is none yet.
        asked: the settings that were said, as `section.key`.
        notes: lines for people on what was chosen for them.
        computed_in, also_computed_in: as asked for.
    """

    folder: Path
    config: Config
    adapter_path: str
    dtype: str
    assignments: bool
    index: Index | None
    asked: frozenset[str]
    notes: tuple[str, ...]
    computed_in: str = ""
    also_computed_in: str = ""

    def open(self, device: torch.device | str, features: str = "", compiled: bool = False) -> Encoder:
        """The encoder of the index, with its projector.

        Args:
            device: to compute on; an index goes on in the dtype that it was computed in, unless its owner asks for
                another, which its manifest says then.
            features: a feature store to read instead of images; empty: none.
            compiled: have torch compile the model; an index that was made so goes on so.

        Raises:
            InputError: a model or a projector that is not there, or not the index's.
        """
        model = self.config.model
        where = {"features": features, "local_files_only": model.local_files_only, "revision": model.revision}
        held = self.index.manifest.hidden_states.get("computed_in", "") if self.index else ""
        where["dtype"] = FLOATS.get((self.also_computed_in or self.computed_in or held).partition(" ")[0])
        compiled = compiled or (held.endswith(f" {COMPILED}") and not (features or self.also_computed_in))
        made = self.folder if self.index else self.adapter_path
        hint = (
            ""
            if "model.name" in self.asked or not made
            else f"{made} was made with it: say where it is with model.name=FOLDER"
        )
        encoder = _opened(model.name, device, hint, **where, reduce=self.config.reduce)
        if compiled:
            encoder.compile()
        if self.index:
            self._check_encoder(self.index, encoder)
            encoder.use_projector(self._projector(self.index, encoder))
        elif self.adapter_path:
            encoder.use_projector(self._adapter(encoder))
        return encoder

    def _adapter(self, encoder: Encoder) -> Projector:
        local = self.config.model.local_files_only
        return load_projector(self.adapter_path, encoder, local_files_only=local)

    def pictures(self) -> str:
        """The folder of pictures that the index was made of.

        Raises:
            InputError: there is no index yet, or it holds none.
        """
        splits = self.index.manifest.splits.values() if self.index else ()
        roots = [split.root for split in splits if split.root]
        if not roots:
            what = "holds no folder of pictures" if self.index else "there is no index yet"
            raise InputError(f"{self.folder}: {what}; make it with scripts/index.py --images FOLDER --cache-dir INDEX")
        if not exists(roots[0]):
            where = "mount it, or say with --images where it is now"
            raise InputError(f"{roots[0]}: not there, but {self.folder} holds its pictures; {where}")
        return roots[0]

    def projector_words(self) -> str:
        """In a few words, which projector it has."""
        if self.adapter_path or not self.index:
            return self.adapter_path or "projection untouched"
        manifest = self.index.manifest
        return "projection untouched" if manifest.projector == manifest.model.base_projector else "its own projector"

    def _check_encoder(self, index: Index, encoder: Encoder) -> None:
        """Refuses another model, and hidden states that come from elsewhere than the index's."""
        index.check_model(encoder)
        manifest, before, now = index.manifest, index.manifest.hidden_states, encoder.origin
        known, asked = (before.get("computed_in"), *manifest.also_computed_in), now["computed_in"]
        if {**before, "computed_in": asked} == now and asked in (*known, self.also_computed_in):
            if asked not in known:
                self._allow(asked)
            return
        remedy = "read the feature store that it was made from"
        if before.get("stored_in") == now["stored_in"]:
            remedy = f"leave --dtype out, or say --also-computed-in {now['computed_in']} to have both in it"
        elif before.get("stored_in") == "nothing":
            remedy = "leave --features out"
        elif now.get("stored_in") == "nothing":
            remedy = "give the feature store that it was made from as --features"
        raise InputError(
            f"{self.folder} holds an index with hidden_states={before}, now {now}; {remedy}, or name another folder"
        )

    def _allow(self, dtype: str) -> None:
        """Has the index say that images computed in this dtype, too, may be in it."""
        if rank() == 0:
            with only_writer(self.folder):
                path = self.folder / "manifest.json"
                held = read_index_manifest(path)
                both = tuple(sorted({*held.also_computed_in, dtype}))
                write_index_manifest(path, replace(held, also_computed_in=both))
        gather_objects(None)  # no process reads it before

    def _projector(self, index: Index, encoder: Encoder) -> Projector:
        """The index's projector; what --adapter-path names must be the same.

        Raises:
            InputError: it is another; the index's own is damaged and not given.
        """
        held = index.manifest.projector
        if self.adapter_path:
            projector = self._adapter(encoder)
            if projector.hash != held:
                refuse(self.folder, "projector", held[:12], projector.hash[:12], f"--adapter-path {self.adapter_path}")
            return projector
        if held == encoder.base_projector.hash:
            return encoder.base_projector
        try:
            return index.projector()
        except InputError as error:
            raise InputError(f"{error}; or give the projector that it was made with as --adapter-path") from None


def encoder_of(
    index: Index,
    device: torch.device | str,
    *,
    model: str | None = None,
    features: str = "",
    pictures: bool = True,
    dtype: torch.dtype | None = None,
) -> Encoder:
    """The encoder that an index was made with, whatever its projection.

    Args:
        index: says where the model is.
        device: to compute on.
        model: where it is instead.
        features: a feature store to read instead of images; empty: none.
        pictures: False: it is for queries alone, as in `Retriever.load`.
        dtype: that it computes in; None: as `open_encoder` chooses.

    Raises:
        InputError: it can't be loaded, or it is another one than the index was made with.
    """
    name, revision = index.model_place(model)
    hint = "" if model else f"{index.folder} was made with it: say where it is with --model FOLDER"
    where = {"features": features, "revision": revision, "pictures": pictures, "dtype": dtype}
    encoder = _opened(name, device, hint, **where, reduce=index.manifest.reduce if pictures else None)
    index.check_model(encoder)
    return encoder


def _opened(name: str, device: torch.device | str, hint: str, **where: Any) -> Encoder:
    """As `open_encoder`; where the model is not on this machine, `hint` says more."""
    try:
        return open_encoder(name, device, **where)
    except InputError as error:
        if hint and model_folder(name, where["revision"]) is None:
            raise InputError(f"{error}. {hint}") from None
        raise


def settings_for(folder: str | Path, asked: Asked, dtype: str) -> Settings:
    """What an index is made by: what is asked for, else what the index says that is there, else the defaults.

    Args:
        folder: of the index.
        asked: by the user; what contradicts an index that is there is refused, what agrees with it is fine.
        dtype: of stored vectors, where nobody says it.

    Raises:
        InputError: bad settings, or such as contradict the index: names both values and what to do.
    """
    folder = lookup(folder)
    return _of_index(folder, asked) if is_file(folder / "manifest.json") else _of_new(folder, asked, dtype)


def _of_new(folder: Path, asked: Asked, dtype: str) -> Settings:
    """The settings of an index that is made now."""
    config, keys, notes = adapter_config(asked.adapter_path, asked.config, asked.overrides), asked.keys(), []
    merge = config.merge
    free = not (asked.adapter_path or asked.config or "merge.center_init" in keys)
    if free and merge.compressor == "samer":
        config = replace(config, merge=replace(merge, center_init="farthest"))
        notes.append(FARTHEST)
    assignments = asked.assignments
    if assignments is None:
        few = vectors_of(merge.num_regions, MANY_TOKENS) <= NO_REGION
        assignments = merge.compressor != "none" and few  # where all tokens are kept, each is its own region
        if not few and merge.compressor != "none":
            notes.append(f"{TOO_MANY}, not {merge.num_regions}")
    name = asked.dtype or dtype
    refuse_new_codes(folder, name)
    if asked.also_computed_in:
        raise InputError(f"{folder}: there is no index yet, so nothing is mixed; say --dtype {asked.also_computed_in}")
    settings = name, assignments, None, frozenset(keys), tuple(notes), asked.computed_in or ""
    return Settings(folder, config, asked.adapter_path, *settings)


def _of_index(folder: Path, asked: Asked) -> Settings:
    """The settings of an index that is there.

    Raises:
        InputError: something else was asked for.
    """
    index = Index(folder)
    held, config, keys = index.manifest, load_config(asked.config, asked.overrides), asked.keys()
    source = f" in {asked.config}" if asked.config else ""
    used = settings_used(held.merge)
    for name in sorted(key.removeprefix("merge.") for key in keys if key.startswith("merge.")):
        before, now = getattr(held.merge, name), getattr(config.merge, name)
        if name in used and before != now:
            refuse(folder, f"merge.{name}", before, now, f"merge.{name}={now}{source}")
    _check_reduction(folder, held.reduce, config.reduce, keys, source)
    if asked.dtype and asked.dtype != held.dtype:
        refuse(folder, "dtype", held.dtype, asked.dtype, f"--cache-dtype {asked.dtype}")
    if asked.assignments not in (None, held.assignments):
        said = "--assignments" if asked.assignments else "--no-assignments"
        refuse(folder, "assignments", held.assignments, asked.assignments, said)
    model, notes = config.model, []
    name, revision = index.model_place()
    if "model.name" in keys:
        name, revision = model_name(model.name), model.revision
    elif "model.revision" in keys:
        revision = model.revision
    if (name, revision) != index.model_place():
        known = identify(name, revision)
        if known and (part := held.model.difference(known)):
            said = f"model.name={name} model.revision={revision}"
            before, now = (
                f"{place} ({part} {getattr(identity, part)[:12]})"
                for place, identity in ((held.base_model, held.model), (name, known))
            )
            refuse(folder, "model", before, now, said)
        notes.append(f"the model is read from {name}; the index named {held.base_model}")
    config = replace(
        config, merge=held.merge, reduce=held.reduce, model=ModelConfig(name, revision, model.local_files_only)
    )
    also = asked.also_computed_in or ""
    if also and asked.computed_in not in (None, "", also):
        raise InputError(f"--dtype {asked.computed_in} --also-computed-in {also}: what is added now has one dtype")
    if also and also not in (held.hidden_states.get("computed_in"), *held.also_computed_in):
        notes.append(f"images computed in {also} join those in {held.hidden_states.get('computed_in')}; it says so")
    settings = held.dtype, held.assignments, index, frozenset(keys), tuple(notes), asked.computed_in or "", also
    return Settings(folder, config, asked.adapter_path, *settings)


def _check_reduction(folder: Path, held: ReduceConfig, asked: ReduceConfig, keys: set[str], source: str) -> None:
    """Refuses a reduction that contradicts an index; one made without is not gone on with otherwise.

    Raises:
        InputError: names the first setting that differs.
    """
    said = {key.removeprefix("reduce.") for key in keys if key.startswith("reduce.")}
    if not said:
        return
    used, wanted = reduction_used(held), reduction_used(with_statistics(asked))
    said |= {"mean", "deviation"} if "statistics" in said else set()
    for name in [each for each in wanted if each in said or each == "method"]:
        if used.get(name) != wanted[name]:
            before, now = used.get(name), wanted[name]
            name = "statistics" if name in ("mean", "deviation") else name
            refuse(folder, f"reduce.{name}", before, now, f"reduce.{name}={getattr(asked, name)}{source}")


def refuse(folder: Path, name: str, before: Any, now: Any, said: str) -> None:
    """Refuses what contradicts an index.

    Raises:
        InputError: always; names both values, and what was `said`.
    """
    raise InputError(
        f"{folder} holds an index with {name}={before}, now {now}: it says itself how it was made, so leave {said} out "
        "to add to it, or name another index folder"
    )


def adapter_config(adapter_path: str, config_path: str | None, overrides: Sequence[str]) -> Config:
    """Settings of a trained projector: from the config file if given, else from its config.json; overrides win.

    Args:
        adapter_path: a projector's folder or file, or the hub id of one (owner/name); empty: none.
        config_path: a YAML file, or None.
        overrides: `section.key=value`.

    Raises:
        InputError: no projector there, or one that says nothing of its model and merge.
    """
    config = load_config(config_path, overrides)
    if not adapter_path:
        return config
    folder = projector_place(adapter_path, local_files_only=config.model.local_files_only)
    if folder.name == "projector.safetensors":  # what it was trained for stands beside it
        folder = folder.parent
    if config_path or not is_file(folder / "projector.safetensors"):
        return config
    trained = read_json(folder / "config.json")
    name, merge = trained.get("base_model"), trained.get("merge")
    if not (isinstance(name, str) and isinstance(merge, dict)):
        raise InputError(f"{adapter_path}/config.json: no base_model or no merge settings; give --config")
    about = {"model.name": name, "model.revision": trained.get("revision", "main")}
    about |= {f"merge.{key}": value for key, value in merge.items()}
    return load_config(None, [*(f"{key}={value}" for key, value in about.items()), *overrides])
