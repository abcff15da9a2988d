"""Embeddings in files of arrays: `X.npz` and `X.safetensors`.

Either `embedding` (or `embeddings`): (n, N, D), or (sum of N, D) with `lengths` (n,); beside it `ids` (n,), without
which the rows are numbered, `scale` (n,) of int8, `grid` (n, 2) and `coords` (n, N, 2), where they are there. Or an
array (N, D) an image, whose id is its name. In safetensors `ids` is a list in JSON in the file's metadata.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError

from samer.config import InputError
from samer.runtime.files import atomic_path, check_writable, trouble
from samer.runtime.processes import print0
from samer.runtime.shards import mapped
from samer.vectors.parts import Parts
from samer.vectors.rows import COORDS, EMBEDDING, GRID, ID, SCALE, Row
from samer.vectors.stores import FileStore, Plan
from samer.vectors.tables import make_row

NAMES = (EMBEDDING, "embeddings")
IDS, LENGTHS = "ids", "lengths"
SIDES = (IDS, LENGTHS, SCALE, GRID, COORDS)
_SAFE = {"float32": "F32", "float16": "F16", "int8": "I8", "uint8": "U8", "int64": "I64"}


class ArrayStore(FileStore):
    """What both kinds of file share; a subclass opens one and reads rows of an array."""

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every array, by name in order."""
        raise NotImplementedError

    def _whole(self, name: str) -> np.ndarray:
        """An array that is small."""
        raise NotImplementedError

    def _pieces(self, name: str, counts: Sequence[int]) -> Iterator[np.ndarray]:
        """An array's rows, so many at a time."""
        raise NotImplementedError

    def _read_ids(self) -> list[str] | None:
        return [str(name) for name in self._whole(IDS).tolist()] if IDS in self._shapes() else None

    def _layout(self) -> tuple[str | None, list[int]]:
        """The name of the array of all vectors, None where each image has one, and how many each image has.

        Raises:
            InputError: none of the forms above.
        """
        self.check_there()
        shapes = self._shapes()
        name = next((each for each in NAMES if each in shapes), None)
        if name is None:
            own = {key: shape for key, (shape, _) in shapes.items() if key not in SIDES}
            if not own or any(len(shape) != 2 for shape in own.values()):
                held = ", ".join(shapes) or "nothing"
                raise InputError(
                    f"{self.place}: no array 'embedding', nor one (N, D) an image (it has {held}); name it so"
                )
            return None, [shape[0] for shape in own.values()]
        shape, dtype = shapes[name]
        if dtype == "uint8" or not (dtype.startswith("float") or dtype == "int8"):
            raise InputError(f"{self.place}: {name} is {dtype}; expected floating numbers, or int8 with 'scale'")
        if dtype == "int8" and SCALE not in shapes:
            raise InputError(f"{self.place}: {name} is int8 without 'scale', one number an image; add it")
        if len(shape) == 3:
            return name, [shape[1]] * shape[0]
        if len(shape) != 2 or LENGTHS not in shapes:
            raise InputError(f"{self.place}: {name} is {shape}; expected (n, N, D), or (sum, D) with 'lengths' (n,)")
        lengths = [int(each) for each in self._whole(LENGTHS)]
        if sum(lengths) != shape[0] or min(lengths, default=0) < 0:
            raise InputError(
                f"{self.place}: 'lengths' add up to {sum(lengths)}, {name} has {shape[0]} rows; correct them"
            )
        return name, lengths

    def ids(self) -> Iterator[str]:
        name, lengths = self._layout()
        if name is None:
            yield from (key for key in self._shapes() if key not in SIDES)
            return
        ids = self._read_ids()
        if ids is not None and len(ids) != len(lengths):
            raise InputError(f"{self.place}: {len(ids)} ids for {len(lengths)} images; give each one")
        yield from ids or map(str, range(len(lengths)))

    def rows(self) -> Iterator[Row]:
        name, lengths = self._layout()
        ids = list(self.ids())
        if name is None:
            for number, key in enumerate(ids):
                (values,) = self._pieces(key, [lengths[number]])
                yield make_row(f"{self.place}: {key[:80]}", _floats(values), {ID: key})
            return
        wanted = (SCALE, GRID) if self._shapes()[name][1] == "int8" else (GRID,)
        sides = {key: self._whole(key) for key in wanted if key in self._shapes()}
        for key, values in sides.items():
            if len(values) != len(ids):
                raise InputError(f"{self.place}: {key} has {len(values)} rows for {len(ids)} images; give each one")
        flat = len(self._shapes()[name][0]) == 2
        counts = lengths if flat else [1] * len(lengths)
        places = self._pieces(COORDS, counts) if COORDS in self._shapes() else iter([None] * len(ids))
        for number, (values, place) in enumerate(zip(self._pieces(name, counts), places)):
            rest: dict[str, Any] = {key: column[number] for key, column in sides.items()}
            values, place = (each if flat or each is None else each[0] for each in (values, place))
            yield make_row(f"{self.place}: row {number}", _floats(values), {ID: ids[number], COORDS: place, **rest})

    def check_target(self, plan: Plan) -> None:
        super().check_target(plan)
        check_writable(self.place)

    @contextmanager
    def _collected(self, parts: Parts) -> Iterator[tuple[BinaryIO, tuple[int, ...], dict[str, np.ndarray], list[str]]]:
        """A file with the vectors' bytes, their shape, the small arrays beside them, and the ids."""
        if parts.columns:
            print0(f"note: {self.place} holds no metadata; left out: {', '.join(parts.columns)}")
        ids: list[str] = []
        lengths: list[int] = []
        scales: list[float] = []
        with tempfile.TemporaryFile(dir=parts.files[0].parent) as flat:
            for rows in parts:
                for row in rows:
                    flat.write(np.ascontiguousarray(row.values).tobytes())
                    ids.append(row.id)
                    lengths.append(len(row.values))
                    scales.append(row.scale)
            flat.seek(0)
            alike = len(set(lengths)) == 1
            shape = (len(ids), lengths[0]) if alike else (sum(lengths),)
            sides = {} if alike else {LENGTHS: np.asarray(lengths)}
            sides |= {SCALE: np.asarray(scales, np.float32)} if parts.dtype == "int8" else {}
            yield flat, (*shape, parts.stored_width), sides, ids


def _floats(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float32))  # a copy: what is read may be mapped


class NpzStore(ArrayStore):
    """numpy's archive; arrays are read from it a few rows at a time, and pickled ones are refused."""

    form = "FILE.npz"
    suffix = ".npz"

    @contextmanager
    def _opened(self) -> Iterator[zipfile.ZipFile]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except (zipfile.BadZipFile, EOFError, zipfile.zlib.error) as error:
            raise InputError(f"{self.place}: no whole npz file ({error}); restore it") from None
        except OSError as error:
            raise trouble(self.path, error) from None

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        if not hasattr(self, "_known"):
            self._known = {}
            with self._opened() as archive:
                for member in archive.namelist():
                    with archive.open(member) as handle:
                        shape, kind = self._head(member, handle)
                    self._known[member.removesuffix(".npy")] = shape, kind.name
        return self._known

    def _head(self, member: str, handle: Any) -> tuple[tuple[int, ...], np.dtype]:
        try:
            version = np.lib.format.read_magic(handle)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(handle)
        except ValueError as error:
            raise InputError(
                f"{self.place}: {member[:80]} is no array ({str(error)[:120]}); restore the file"
            ) from None
        if dtype.hasobject:
            raise InputError(
                f"{self.place}: {member[:80]} holds Python objects; save it as an array of numbers or texts"
            )
        if fortran and len(shape) > 1:
            raise InputError(f"{self.place}: {member[:80]} is stored by columns; save numpy.ascontiguousarray of it")
        return shape, dtype

    def _whole(self, name: str) -> np.ndarray:
        (values,) = self._pieces(name, [self._shapes()[name][0][0]])
        return values

    def _pieces(self, name: str, counts: Sequence[int]) -> Iterator[np.ndarray]:
        with self._opened() as archive, archive.open(f"{name}.npy") as handle:
            shape, dtype = self._head(name, handle)
            each = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
            for count in counts:
                content = handle.read(count * each)
                if len(content) != count * each:
                    raise InputError(f"{self.place}: {name} ends too early; restore the file")
                yield np.frombuffer(content, dtype).reshape(count, *shape[1:])

    def write(self, parts: Parts) -> None:
        with self._collected(parts) as (flat, shape, sides, ids), atomic_path(self.place) as temporary:
            kind = np.dtype("uint8" if parts.dtype == "binary" else parts.dtype)
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                for name, values in {IDS: np.asarray(ids), **sides}.items():
                    with archive.open(f"{name}.npy", "w") as member:
                        np.lib.format.write_array(member, values, allow_pickle=False)
                with archive.open(f"{EMBEDDING}.npy", "w", force_zip64=True) as member:
                    head = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_2_0(member, head)
                    shutil.copyfileobj(flat, member, 2**20)


class SafetensorsStore(ArrayStore):
    """A safetensors file, which is mapped."""

    form = "FILE.safetensors"
    suffix = ".safetensors"

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with mapped(self.path) as handle:
                yield handle
        except (SafetensorError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.place}: no whole safetensors file ({str(error)[:120]}); restore it") from None
        except OSError as error:
            raise trouble(self.path, error) from None

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        if not hasattr(self, "_known"):
            with self._opened() as handle:
                self._tensors = {name: handle.get_tensor(name) for name in handle.offset_keys()}
                self._ids = (handle.metadata() or {}).get(IDS)
            about = {name: (tuple(each.shape), str(each.dtype)) for name, each in self._tensors.items()}
            self._known = {
                name: (shape, kind.removeprefix("torch.").replace("bfloat16", "float16"))
                for name, (shape, kind) in about.items()
            }
        return self._known

    def _read_ids(self) -> list[str] | None:
        self._shapes()
        if self._ids is None:
            return None
        try:
            found = json.loads(self._ids)
        except ValueError:
            found = None
        if not isinstance(found, list):
            raise InputError(f"{self.place}: 'ids' in its metadata is no list in JSON; write it so")
        return [str(name) for name in found]

    def _whole(self, name: str) -> np.ndarray:
        self._shapes()
        return self._tensors[name].numpy()

    def _pieces(self, name: str, counts: Sequence[int]) -> Iterator[np.ndarray]:
        self._shapes()
        start = 0
        for count in counts:
            part = self._tensors[name][start : start + count]
            yield (part.float() if part.dtype == torch.bfloat16 else part).numpy()
            start += count

    def write(self, parts: Parts) -> None:
        with self._collected(parts) as (flat, shape, sides, ids), atomic_path(self.place) as temporary:
            kind = np.dtype("uint8" if parts.dtype == "binary" else parts.dtype)
            size = kind.itemsize * int(np.prod(shape, dtype=np.int64))
            head: dict[str, Any] = {"__metadata__": {IDS: json.dumps(ids, ensure_ascii=False)}}
            head[EMBEDDING] = {"dtype": _SAFE[kind.name], "shape": list(shape), "data_offsets": [0, size]}
            for name, values in sides.items():
                ends = [size, size + values.nbytes]
                head[name] = {"dtype": {"float32": "F32", "int64": "I64"}[values.dtype.name], "shape": [len(values)]}
                head[name]["data_offsets"] = ends
                size = ends[1]
            content = json.dumps(head, ensure_ascii=False).encode()
            content += b" " * (-len(content) % 8)  # the tensors after it start at a multiple of 8
            with open(Path(temporary), "wb") as file:
                file.write(len(content).to_bytes(8, "little") + content)
                shutil.copyfileobj(flat, file, 2**20)
                for values in sides.values():
                    file.write(values.tobytes())
