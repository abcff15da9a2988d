"""Retrievers. A new family is a file beside these with a `Family`, and a line in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from samer.config import InputError
from samer.retrievers.colpali import ColPali
from samer.retrievers.colqwen2 import ColQwen2
from samer.retrievers.family import Family
from samer.retrievers.modernvbert import ColModernVBert
from samer.retrievers.neomme import NeoMME
from samer.retrievers.towers import Towers

FAMILIES: dict[str, type[Family]] = {
    each.architecture: each for each in (ColPali, ColQwen2, ColModernVBert, NeoMME, Towers)
}


def find_family(config: Mapping[str, Any]) -> type[Family]:
    """The family of a model, by the contents of its config.json: `architectures`, or else `model_type`.

    Raises:
        InputError: none that is known here.
    """
    names, kind = config.get("architectures"), config.get("model_type")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    family = FAMILIES.get(name) or next((each for each in FAMILIES.values() if each.model_type == kind), None)
    if family is not None and family.model_type == kind:
        return (
            family  # else transformers would build a random model of the default size, gigabytes, of another's config
        )
    known = ", ".join(f"{family.model_type!r} ({name})" for name, family in FAMILIES.items())
    raise InputError(f"its config.json is of model type {kind!r} (architecture {name!r}); there are {known}")
