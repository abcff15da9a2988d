"""Banks of query tokens (METHOD section 2b): made of texts, kept with a projector, and refused with another.

    bank.safetensors    vectors (R, D) and weights (R,), float32; its header, that of a shard (`samer.runtime.shards`),
                        says what it was made from: a hash of the texts and how many, where they came from, the most
                        vectors asked for, the projector's hash and the model

A bank is of one projector. While a projector trains, the hidden states of the same tokens are kept and projected anew.

Shape letters: T texts, R vectors, M query tokens, H hidden, D embedding.
"""

from __future__ import annotations

import codecs
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from samer.compressors.querybank import check_bank, draw, sample_queries
from samer.config import InputError
from samer.data.records import LONGEST_CAPTION, Caption, ImageRecord
from samer.retrievers.base import NO_OFFSET, Encoder, Projection, Projector
from samer.retrievers.identity import ModelIdentity
from samer.runtime.files import is_dir, is_file, opened, trouble
from samer.runtime.processes import from_first
from samer.runtime.progress import batched, prefetched
from samer.runtime.shards import load_shard, tensors_checksum, unreadable, write_shard

FILE = "bank.safetensors"
FORMAT, FORMAT_VERSION = "samer_bank", 1
REMEDY = "make one with scripts/bank.py"
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


@dataclass(frozen=True)
class Origin:
    """What a bank's tokens are of.

    Attributes:
        texts: SHA-256 of the texts and how often each was given, in no order.
        count: how many texts, repeated ones too.
        source: in words, where they came from.
        size: the most vectors asked for.
        model: the retriever.
        base_model: its name, as it was given.
    """

    texts: str
    count: int
    source: str
    size: int
    model: ModelIdentity
    base_model: str


@dataclass(frozen=True)
class Bank:
    """Query tokens of one projector: vectors (R, D) of unit norm and weights (R,), float32 on the CPU."""

    vectors: Tensor
    weights: Tensor
    origin: Origin
    projector: str  # its hash

    @property
    def state(self) -> dict[str, Tensor]:
        """What a compressor takes over by `load_state`."""
        return {"vectors": self.vectors, "weights": self.weights}

    @property
    def hash(self) -> str:
        """SHA-256 of the contents of both tensors; names the bank in an index."""
        return tensors_checksum(self.state)

    def describe(self) -> str:
        """What it is, for people."""
        return f"{len(self.vectors):,} vectors of {self.origin.count:,} texts, {self.origin.source}"


@dataclass(frozen=True)
class QueryStates:
    """Hidden states (R, H) of the tokens of a bank and their weights (R,) float32: a bank for any projector."""

    hidden: Tensor
    weights: Tensor
    origin: Origin

    @torch.no_grad()
    def bank(self, projector: Projector) -> Bank:
        """The bank of these tokens by a projector."""
        return Bank(Projection(projector)(self.hidden), self.weights, self.origin, projector.hash)


def captions_of(records: Iterable[ImageRecord]) -> list[str]:
    """Distinct captions of a data set, in the order of their first use: what a bank is made of."""
    return list(dict.fromkeys(caption.text for record in records for caption in record.captions))


def read_texts(file: str | Path) -> list[str]:
    """Texts of a file, one a line, UTF-8 or UTF-16 with its mark; empty lines are left out, repeated ones stay.

    A text is cut after its last whole word within `LONGEST_CAPTION` characters.

    Raises:
        InputError: not readable, no text, or nothing in it.
    """
    try:
        with opened(file) as handle:
            content = handle.read()
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; name one with a caption or query a line") from None
    except OSError as error:
        raise trouble(file, error) from None
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        lines = content.decode(encoding).splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not {encoding} (byte {error.start:,}); save it as UTF-8") from None
    texts = [Caption(line.strip(), (), True).within(LONGEST_CAPTION).text for line in lines if line.strip()]
    if not texts:
        raise InputError(f"{file}: holds no text; write a caption or query a line")
    if any("\0" in text for text in texts):
        raise InputError(f"{file}: holds NUL, so it is no text; name a file with a caption or query a line")
    return texts


def query_states(retriever: Encoder, texts: Sequence[str], size: int, source: str, batch_size: int = 32) -> QueryStates:
    """Hidden states of a bank's tokens: those of the texts themselves, without prompt, augmentation and special tokens.

    At most `size` texts are encoded, drawn as the tokens are (`sample_queries`), by what they say, whatever their
    order. The first process computes them, so every one must call this.

    Args:
        retriever: its projector in use tells which tokens are the same.
        texts: a repeated one counts as often as it is given.
        size: the most vectors of the bank.
        source: in words, where the texts came from.
        batch_size: texts per forward pass.

    Raises:
        InputError: no text, or none with a token of its own.
    """
    asked = Counter(text for text in texts if text.strip())
    if not asked:
        raise InputError(f"a query bank needs texts, and there is none ({source}); {REMEDY} --texts FILE")
    whole = "\n".join(f"{count} {text}" for text, count in sorted(asked.items()))
    about = Origin(
        hashlib.sha256(whole.encode()).hexdigest(), asked.total(), source, size, retriever.identity, retriever.name
    )
    hidden, weights = from_first(lambda: _sampled(retriever, asked, size, batch_size))
    return QueryStates(hidden, weights, about)


@torch.no_grad()
def _sampled(retriever: Encoder, asked: Counter[str], size: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """Hidden states (R, H) and weights (R,) float32 of a bank's tokens, on the CPU."""
    digests = {hashlib.sha256(text.encode()).digest(): text for text in asked}
    order = [digests[digest] for digest in sorted(digests)]
    counts = torch.tensor([float(asked[text]) for text in order], dtype=torch.float64)
    numbers = np.array([int.from_bytes(digest[:8], "big") >> 11 for digest in sorted(digests)]) / 2**53  # in [0, 1)
    chosen, counts = draw(counts, torch.from_numpy(numbers), size)
    hidden, vectors, weights = [], [], []
    rows = iter(counts.tolist())
    for _, inputs in prefetched(retriever.query_inputs, batched([order[k] for k in chosen], batch_size)):
        own = inputs["attention_mask"].bool().cpu()
        if "offsets" in inputs:
            own &= inputs["offsets"][..., 0].cpu() != NO_OFFSET
        states = retriever.hidden_states(inputs)
        vectors.append(retriever.project(states).cpu()[own])
        hidden.append(states.cpu()[own])
        each = torch.tensor([next(rows) for _ in own], dtype=torch.float64)
        weights.append(each[:, None].expand(own.shape)[own])
    if not sum(map(len, hidden)):
        raise InputError(f"none of {len(asked):,} texts has a token of its own; name a file with captions or queries")
    kept, share = sample_queries(torch.cat(vectors), torch.cat(weights), size)
    return torch.cat(hidden)[kept], share.float()


def save_bank(file: str | Path, bank: Bank) -> None:
    """Writes a bank in one step."""
    stamp = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(bank.origin), "projector": bank.projector}
    write_shard(Path(file), bank.state, stamp, {"vectors": len(bank.vectors)})


def read_bank(file: str | Path) -> Bank:
    """The bank in a file, whose checksum holds.

    Raises:
        InputError: missing, damaged, or something else.
    """
    try:
        tensors, header = load_shard(Path(file))
        stamp = dict(header.get("stamp", {}))
        if (stamp.pop("format", None), stamp.pop("format_version", None)) != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"it is no bank of format {FORMAT} {FORMAT_VERSION}")
        if header["checksum"] != tensors_checksum(tensors):
            raise ValueError("contents differ from their checksum")
        check_bank(tensors["vectors"], tensors["weights"])
        projector, model = stamp.pop("projector"), ModelIdentity(**stamp.pop("model"))
        return Bank(tensors["vectors"], tensors["weights"], Origin(**stamp, model=model), projector)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise unreadable(Path(file), error, REMEDY) from None


def load_bank(path: str | Path, retriever: Encoder) -> Bank:
    """The bank in a file, or in a projector's folder, for a retriever with its projector in use.

    Raises:
        InputError: as `read_bank`, or a bank of another model or projector; names both.
    """
    file = Path(path) / FILE if is_dir(path) else Path(path)
    bank = read_bank(file)
    if other := bank.origin.model.difference(retriever.identity):
        raise InputError(
            f"{file}: this query bank was made with {bank.origin.base_model!r}, not with {retriever.name!r} "
            f"({other.replace('_', ' ')} differs); {REMEDY} and that model"
        )
    now = retriever.current_projector().hash
    if bank.projector != now:
        raise InputError(
            f"{file}: this query bank is of projector {bank.projector[:12]}, not of {now[:12]}, which is in use; "
            f"{REMEDY} and that projector (--adapter-path)"
        )
    return bank


def bank_beside(adapter: Path, retriever: Encoder) -> Bank | None:
    """The bank that lies beside a projector's file or in its folder; None: there is none."""
    file = (adapter if is_dir(adapter) else adapter.parent) / FILE
    return load_bank(file, retriever) if is_file(file) else None
