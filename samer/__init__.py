"""SaMer: object-evidence preserving token merging for multi-vector image retrieval (arXiv 2607.04605)."""

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
