"""Every way from N to K tokens behind one protocol. A new one is a file beside these and a line in `COMPRESSORS`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from samer.compressors.base import Compressor
from samer.compressors.grid import GridPooling
from samer.compressors.hpc import HPC
from samer.compressors.hpool import HPool
from samer.compressors.kmeans import KMeans
from samer.compressors.none import NoCompression
from samer.compressors.querybank import QueryBank
from samer.compressors.random import RandomPruning
from samer.compressors.samer import Samer
from samer.compressors.sap import SapMax, SapMean
from samer.config import InputError, MergeConfig

COMPRESSORS: dict[str, type[Compressor]] = {
    "none": NoCompression,
    "samer": Samer,
    "hpool": HPool,
    "hpc": HPC,
    "sap-mean": SapMean,
    "sap-max": SapMax,
    "random": RandomPruning,
    "grid": GridPooling,
    "kmeans": KMeans,
    "querybank": QueryBank,
}


def make_compressor(settings: MergeConfig) -> Compressor:
    """The compressor that `settings.compressor` names.

    Raises:
        InputError: a name that is not in the registry.
    """
    if not isinstance(settings, MergeConfig):
        raise InputError(
            f"a compressor is made of a MergeConfig, such as MergeConfig(compressor='hpool'); {settings!r:.80}"
        )
    kind = COMPRESSORS.get(settings.compressor)
    if kind is None:
        known = ", ".join(sorted(COMPRESSORS))
        raise InputError(f"merge.compressor {settings.compressor!r} is unknown; use one of {known}")
    return kind(settings)


def settings_used(settings: MergeConfig) -> dict[str, Any]:
    """The compressor's name and the settings that it uses; two that agree in these compress alike.

    Raises:
        InputError: as `make_compressor`.
    """
    return {name: getattr(settings, name) for name in ("compressor", *make_compressor(settings).settings_used)}


def settings_written(settings: MergeConfig) -> dict[str, Any]:
    """All settings as files hold them; what earlier files lack, only where it changes something.

    That is `bank_size` and `sap_layers` where the compressor uses them, and `global_view` where it is not as it was.
    """
    found = asdict(settings)
    if settings.global_view == MergeConfig.global_view:
        del found["global_view"]
    if not settings.sap_layers or "sap_layers" not in settings_used(settings):
        del found["sap_layers"]
    if "bank_size" not in settings_used(settings):
        del found["bank_size"]
    return found
