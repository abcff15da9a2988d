"""Fewer tokens inside a vision tower. A new way is a file beside these and a line in `REDUCERS`."""

from __future__ import annotations

from typing import Any

from samer.config import InputError, ReduceConfig
from samer.reducers.adamerge import AdaMerge
from samer.reducers.base import NoReduction, Reducer
from samer.reducers.cubist import Cubist
from samer.reducers.tome import ToMe

REDUCERS: dict[str, type[Reducer]] = {"none": NoReduction, "tome": ToMe, "adamerge": AdaMerge, "cubist": Cubist}


def reducer_class(method: str) -> type[Reducer]:
    """The reducer of that name.

    Raises:
        InputError: a name that is not in the registry.
    """
    if method not in REDUCERS:
        raise InputError(f"reduce.method {method!r} is unknown; use one of {', '.join(REDUCERS)}")
    return REDUCERS[method]


def settings_used(settings: ReduceConfig) -> dict[str, Any]:
    """The method and the settings that it uses: two that agree in these reduce alike.

    Raises:
        InputError: as `reducer_class`.
    """
    return {name: getattr(settings, name) for name in ("method", *reducer_class(settings.method).used)}
