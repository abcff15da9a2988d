"""SaMer: object-evidence preserving token merging for multi-vector image retrieval (arXiv 2607.04605)."""

from __future__ import annotations

TYPE_CHECKING = False  # type checkers take it for typing's, whose import takes longer than all the rest here
if TYPE_CHECKING:
    from samer.config import InputError, MergeConfig
    from samer.coords import visual_coords
    from samer.losses import multi_positive_t2i_loss
    from samer.merging import merge_tokens
    from samer.metrics import retrieval_metrics
    from samer.objects import instance_labels
    from samer.scoring import maxsim
    from samer.tokens import MergedTokens, QueryTokens, VisualTokens

__version__ = "0.1.0"
__all__ = [
    "InputError",
    "MergeConfig",
    "MergedTokens",
    "QueryTokens",
    "VisualTokens",
    "instance_labels",
    "maxsim",
    "merge_tokens",
    "multi_positive_t2i_loss",
    "retrieval_metrics",
    "visual_coords",
]
_ROOMS = {  # where each public name is; most of them import torch, which a command's --help has no use for
    "InputError": "config",
    "MergeConfig": "config",
    "MergedTokens": "tokens",
    "QueryTokens": "tokens",
    "VisualTokens": "tokens",
    "instance_labels": "objects",
    "maxsim": "scoring",
    "merge_tokens": "merging",
    "multi_positive_t2i_loss": "losses",
    "retrieval_metrics": "metrics",
    "visual_coords": "coords",
}


def __getattr__(name: str) -> object:
    """A public name, or the module of one, imported when it is first asked for."""
    import importlib

    if name in _ROOMS.values():
        return importlib.import_module(f"samer.{name}")
    if name not in _ROOMS:
        raise AttributeError(f"module 'samer' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"samer.{_ROOMS[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS.values()})
