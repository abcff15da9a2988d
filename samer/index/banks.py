"""The query bank of an index: which one it is made with, and its copy beside the manifest."""

from __future__ import annotations

from pathlib import Path

from samer.compressors import make_compressor
from samer.config import InputError, MergeConfig
from samer.data import make_reader
from samer.index.read import Index
from samer.index.settings import Settings, refuse
from samer.retrievers.banks import FILE, Bank, bank_beside, captions_of, load_bank, query_states, read_bank, save_bank
from samer.retrievers.base import Encoder
from samer.runtime.files import FileTrouble, is_file
from samer.runtime.hub import projector_place
from samer.runtime.processes import print0

GIVE = "give one as --bank FILE (scripts/bank.py makes one of any texts)"


def bank_for(settings: Settings, encoder: Encoder, file: str = "") -> Bank | None:
    """The bank that a command line asks for: `file`, else the index's own, else the one beside the projector.

    Args:
        settings: of the index.
        encoder: opened by them.
        file: what --bank says; empty: nothing.

    Returns:
        None: nothing is asked for and nothing is there, or the compressor has no bank.

    Raises:
        InputError: a bank of another model, projector or size, another than the index's, or one that nobody uses.
    """
    merge = settings.config.merge
    if not make_compressor(merge).needs_queries:
        if file:
            raise InputError(f"--bank {file}: {merge.compressor} has no query bank; leave it out, or take querybank")
        return None
    bank = load_bank(file, encoder) if file else None
    if settings.index and bank and bank.hash != (held := settings.index.manifest.bank):
        refuse(settings.folder, "bank", held[:12], bank.hash[:12], f"--bank {file}")
    if settings.index:
        return bank or settings.index.bank()
    if bank is None and settings.adapter_path:
        place = projector_place(settings.adapter_path, local_files_only=settings.config.model.local_files_only)
        bank = bank_beside(place, encoder)
    if bank and "merge.bank_size" in settings.asked and bank.origin.size != merge.bank_size:
        raise InputError(
            f"merge.bank_size={merge.bank_size}, but the query bank at hand was made with {bank.origin.size}; leave it "
            f"out, or {GIVE}"
        )
    return bank


def bank_of_captions(
    root: str | Path, split: str, reader: str, retriever: Encoder, merge: MergeConfig, batch_size: int
) -> Bank:
    """A bank of a split's captions, for who gives none; says so.

    Raises:
        InputError: they can't be had; says how else to give a bank.
    """
    try:
        texts = captions_of(make_reader(reader, root).load_split(root, split, boxes=False))
        states = query_states(retriever, texts, merge.bank_size, f"captions of {split} in {root}", batch_size)
    except InputError as error:
        raise InputError(f"no query bank can be made of {split} ({error}); {GIVE}") from None
    bank = states.bank(retriever.current_projector())
    print0(f"query bank: {bank.describe()}")
    return bank


def held_bank(folder: Path) -> Bank | None:
    """The bank of the index in a folder; None: there is no index yet, or it has none."""
    return Index(folder).bank() if is_file(folder / "manifest.json") else None


def keep_bank(folder: Path, bank: Bank | None) -> None:
    """Writes a bank, if there is one, beside the manifest, if it is not there, or damaged."""
    if bank is None:
        return
    try:
        if read_bank(folder / FILE).hash == bank.hash:
            return
    except FileTrouble:
        raise
    except InputError:
        pass
    save_bank(folder / FILE, bank)
