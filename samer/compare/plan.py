"""The rows of a comparison: what is compressed how, with a projector trained through what."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from samer.compressors import COMPRESSORS
from samer.config import InputError, MergeConfig
from samer.report.gallery import Shown
from samer.retrievers.base import Encoder
from samer.retrievers.projectors import load_projector
from samer.settings import Budget, as_budget

SHARES = (2, 4, 8, 16, 32)  # budgets are N / share
SECTIONS = ("untouched", "adapted", "budgets", "components", "crossed", "banks", "phrases", "cost")
BESIDE = ("phrases", "cost")  # sections without rows of their own; phrases are asked of all rows of the others
_BANK = re.compile(r"[\w][\w -]{0,39}")
NO_BOXES = "without boxes"
OBJECT = "spatial + object"
HARD = 1e-4  # a temperature at which the soft assignment is all but hard
CENTRES = ("raster", "farthest")


@dataclass(frozen=True)
class Row:
    """One line of the comparison: a compression, and what the projector was trained through (None: untouched)."""

    section: str
    name: str
    merge: MergeConfig
    trained: MergeConfig | None = None
    projector: str = ""  # its name among the measurements; empty: that of `trained`
    bank: str = ""  # of queries, by the name it was given; empty: that of the training captions

    @property
    def key(self) -> str:
        """The compression's name among those measured with a projector."""
        return f"{slug(self.merge)}-{self.bank}" if self.bank else slug(self.merge)

    @property
    def measured_with(self) -> str:
        return self.projector or slug(self.trained)


def budgets(tokens_per_image: int, like: Budget = 0) -> list[Budget]:
    """N / 2 to N / 32, each once, largest first; `like` a share, they are shares, too."""
    if isinstance(like, str):
        return [f"1/{share}" for share in SHARES]
    return list(dict.fromkeys(max(1, tokens_per_image // share) for share in SHARES))


def read_budgets(words: Iterable[str]) -> list[Budget]:
    """Budgets as a command line gives them: 64, or 1/16.

    Raises:
        InputError: a word that is neither.
    """
    return [int(word) if word.isdecimal() else as_budget("--budgets", word) for word in words]


def variants(base: MergeConfig) -> dict[str, MergeConfig]:
    """Every registered compressor at `base`'s budget; SaMer with both kinds of centres."""
    every = {}
    for name in COMPRESSORS:
        if name == "samer":
            every |= {f"samer, {init}": replace(base, compressor=name, center_init=init) for init in CENTRES}
        else:
            every[name] = replace(base, compressor=name)
    return every


def plan(
    base: MergeConfig,
    tokens_per_image: int,
    at_budgets: Sequence[Budget] = (),
    methods: Sequence[str] = (),
    banks: Sequence[str] = (),
) -> list[Row]:
    """The rows of the published tables and figures, and the crossings that take the gain apart.

    Args:
        base: the budget K of the tables, and SaMer's settings.
        tokens_per_image: N, of which the budgets are shares.
        at_budgets: K of the section budgets; empty: those shares.
        methods: compressors whose rows are wanted, be it that they compress or are trained through; empty: all.
        banks: names of banks of queries that querybank is measured with beside its own.
    """
    rows = _every_row(base, at_budgets or budgets(tokens_per_image, base.num_regions)) + _bank_rows(base, banks)
    wanted = set(methods or COMPRESSORS)
    return [row for row in rows if {merge.compressor for merge in (row.merge, row.trained) if merge} <= wanted]


def _every_row(base: MergeConfig, at_budgets: Sequence[Budget]) -> list[Row]:
    every = variants(base)
    samer = {init: every[f"samer, {init}"] for init in CENTRES}
    rows = [Row("untouched", name, merge) for name, merge in every.items()]
    for name, merge in every.items():
        rows.append(Row("adapted", name, merge, merge))
        if merge.compressor == "samer" and merge.object_penalty > 0:
            boxless = replace(merge, object_penalty=0.0)
            rows.append(Row("adapted", f"{name}, {NO_BOXES}", boxless, boxless))
    for budget in at_budgets:
        at = {name: replace(merge, num_regions=budget) for name, merge in every.items() if name != "none"}
        rows += [Row("budgets", f"{name} @ {budget}", merge) for name, merge in at.items()]
        trained = [at[f"samer, {init}"] for init in CENTRES]
        rows += [Row("budgets", f"samer, {m.center_init}, trained @ {budget}", m, m) for m in trained]
    for init, full in samer.items():
        spatial = replace(full, object_penalty=0.0)
        feature = replace(spatial, spatial_weight=0.0)
        parts = (("feature", feature), ("feature + spatial", spatial), (f"feature + {OBJECT}", full))
        rows += [Row("components", f"{init}: {name}", merge, merge) for name, merge in parts]
    hard = {init: replace(merge, assignment_temperature=HARD) for init, merge in samer.items()}
    for init, merge in samer.items():
        rows.append(Row("crossed", f"untouched, samer, {init}, hard assignment", hard[init]))
        rows.append(Row("crossed", f"trained with all tokens, samer, {init}", merge, every["none"]))
        through = f"trained through samer, {init}"
        rows.append(Row("crossed", f"{through}, all tokens", every["none"], merge))
        rows.append(Row("crossed", f"{through}, hpool", every["hpool"], merge))
        rows.append(Row("crossed", f"{through}, hard assignment", hard[init], merge))
    rows.append(Row("crossed", "trained with all tokens, hpool", every["hpool"], every["none"]))
    return rows


def _bank_rows(base: MergeConfig, banks: Sequence[str]) -> list[Row]:
    """Query banks of other texts, and what they are held against; none where no bank is given."""
    every = variants(base)
    named = [Row("banks", f"querybank, {name}", every["querybank"], bank=name) for name in banks]
    return [*(Row("banks", name, every[name]) for name in ("none", "kmeans", "querybank")), *named] if banks else []


def shown_methods(
    base: MergeConfig,
    folder: str | Path,
    store: Encoder,
    sections: Sequence[str],
    seed: int,
    methods: Sequence[str] = (),
) -> tuple[list[Shown], list[Shown]]:
    """What a comparison's report shows: the methods of its gallery, the baseline first, and those with regions.

    Args:
        base, folder, sections: as in `compare`.
        store: gives the untouched projector.
        seed: whose trained projectors are taken.
        methods: as in `plan`; all tokens are shown whatever they are.
    """
    every = variants(base)
    plain = store.base_projector
    wanted = set(methods or COMPRESSORS)
    named = {"all tokens": "none", "H-Pool": "hpool", "SAP-mean": "sap-mean", "HPC": "hpc"}
    shown = [Shown(name, every[key], plain) for name, key in named.items() if key == "none" or key in wanted]
    regions: list[Shown] = []
    if "samer" not in wanted:
        return shown, regions
    shown.append(Shown("SaMer, farthest", every["samer, farthest"], plain))
    for init in CENTRES:
        merge = every[f"samer, {init}"]
        regions.append(Shown(f"{init}, untouched", merge, plain))
        if "adapted" in sections:
            projector = load_projector(Path(folder) / "projectors" / f"{slug(merge)}-seed{seed}", store)
            shown.append(Shown(f"SaMer, {init}, trained", merge, projector))
            regions.append(Shown(f"{init}, trained", merge, projector))
    return shown, regions


_EARLIER = {  # the settings of the first comparisons: their projectors and measurements are named by these
    "num_regions",
    "cluster_iters",
    "spatial_weight",
    "assignment_temperature",
    "object_penalty",
    "center_init",
    "compressor",
}


def settings_of(merge: MergeConfig) -> dict:
    """A merge's settings as projectors and measurements are named: a later one only where it isn't the default."""
    values, default = asdict(merge), {field.name: field.default for field in fields(merge)}
    return {name: value for name, value in values.items() if name in _EARLIER or value != default[name]}


def slug(merge: MergeConfig | None) -> str:
    """A folder name for what a projector was trained through."""
    if merge is None:
        return "untouched"
    digest = hashlib.sha256(json.dumps(settings_of(merge), sort_keys=True).encode()).hexdigest()[:8]
    centres = f"-{merge.center_init}" if merge.compressor == "samer" else ""
    regions = str(merge.num_regions).replace("/", "of")  # a share is no folder
    return f"{merge.compressor}{centres}-{regions}-{digest}"


def check_request(
    sections: Sequence[str],
    seeds: Sequence[int],
    at_budgets: Sequence[Budget] = (),
    methods: Sequence[str] = (),
    banks: Iterable[str] = (),
) -> None:
    """Refuses what can't be run, before anything long is done.

    Raises:
        InputError: an unknown section, none at all, or phrases with nothing to ask them of; no seed or one given twice;
            a budget below 1 or given twice; an unknown method; the section banks alone without one, or a bank's name
            that is none.
    """
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown or not sections:
        raise InputError(f"sections {', '.join(unknown) or '(none given)'}: use some of {', '.join(SECTIONS)}")
    if "phrases" in sections and set(sections) <= set(BESIDE):
        raise InputError("sections phrases: they are asked of the rows of other sections; name one of these, too")
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise InputError(f"seeds {list(seeds)}: give at least one, each once, none below 0")
    if len(set(at_budgets)) != len(at_budgets) or any(k < 1 for k in at_budgets if isinstance(k, int)):
        raise InputError(f"budgets {list(at_budgets)}: give each once, none below 1")
    if set(sections) - set(BESIDE) == {"banks"} and not banks:
        raise InputError("sections banks: there is none; give them as --banks NAME=FILE (scripts/bank.py makes one)")
    wrong = [name for name in banks if not _BANK.fullmatch(name)]
    if wrong:
        raise InputError(f"--banks {wrong[0][:40]!r}: a name is up to 40 letters, digits, blanks and hyphens")
    unknown = [name for name in methods if name not in COMPRESSORS]
    if unknown:
        raise InputError(f"methods {', '.join(unknown)}: use some of {', '.join(COMPRESSORS)}")
