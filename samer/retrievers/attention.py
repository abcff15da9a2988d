"""How much attention a patch receives inside the language model, read while it runs (METHOD section 7).

Shape letters: B images, N tokens per image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from samer.config import InputError

# How much attention a patch receives from the patches of its image, by name (METHOD section 7): summed over the rows
# of a layer's attention, mean or max over heads, mean over the middle layers or the last layer alone.
ATTENTION = ("middle_mean", "middle_max", "last")
_WINDOW = re.compile(r"(mean|max):([0-9]+)-([0-9]+)")  # other layers than the middle ones, first and last, by heads


class NoSignals(InputError):
    """A model whose attention says nothing of the whole picture."""


def signal_layers(count: int) -> list[int]:
    """Layers whose attention is read, of a language model with `count`: floor(0.4 L)..floor(0.6 L), then the last."""
    return [*range(int(count * 2 // 5), min(int(count * 3 // 5), count - 1) + 1), count - 1]


def window_of(name: str) -> tuple[str, list[int]] | None:
    """How heads are taken together, and the layers, of a signal such as "mean:11-14"; None of those in `ATTENTION`."""
    found = _WINDOW.fullmatch(name)
    return found and (found[1], [*range(int(found[2]), int(found[3]) + 1)])


def check_signals(needs: Sequence[str], layers: int | None = None, *, windowed: bool = False) -> None:
    """Refuses a name that is neither in `ATTENTION` nor such as "mean:11-14", and a layer that is not there.

    Args:
        needs: names of signals.
        layers: how many the language model has that see the whole picture; None: not known.
        windowed: whether it has others, which are not counted.
    """
    for name in needs:
        window = window_of(name)
        if name not in ATTENTION and window is None:
            raise InputError(f"attention signal {name!r} is unknown; there are {', '.join(ATTENTION)}, and mean:11-14")
        if window and layers is not None and window[1][-1] >= layers:
            which = " of full attention, which alone are counted" if windowed else ""
            raise InputError(
                f"merge.sap_layers {name.partition(':')[2]}: the model has {layers} layers{which}, from 0 on"
            )


_COLUMNS = "samer_columns"  # an attention of transformers' registry: sdpa, and a look at the chosen layers


def _columns_attention(module, query, key, value, attention_mask, **kwargs):
    """sdpa as transformers computes it; where a layer carries a reader, it sees queries, keys and mask before."""
    reader = getattr(module, "samer_reader", None)
    if reader is not None:
        rule, causal = attention_mask, kwargs.get("is_causal")
        if rule is None and (getattr(module, "is_causal", True) if causal is None else causal):
            rule = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
        reader(query, key, rule, kwargs.get("scaling"))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(_COLUMNS, _columns_attention)


AttentionMaskInterface.register(_COLUMNS, sdpa_mask)


@contextmanager
def column_sums(config: Any, attentions: Sequence[nn.Module], layers: Sequence[int], patches: Tensor):
    """Within the block, a forward pass leaves the column sums of patch-to-patch attention of `layers`.

    What flows through the model is what sdpa computes; probabilities are computed beside it, in float32, for one image
    and layer at a time (heads x N x N), summed over the patches' rows and dropped.

    Args:
        config: whose `_attn_implementation` says how they compute.
        attentions: of all layers.
        layers: the numbers of those that are read; one may stand twice.
        patches: (B, N) bool.

    Yields:
        A dict, layer -> (B, heads, N) float32, 0 at columns that are no patch; filled by the forward pass.
    """
    sums: dict[int, Tensor] = {}

    def reader_of(layer: int):
        @torch.compiler.disable  # a loop over images, and what it leaves behind
        def read(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> None:
            # query (B, heads, N, d), key (B, key heads, N, d); mask (B or 1, 1, N, N), bool or added; None: full
            groups = query.shape[1] // key.shape[1]
            scale = scaling if scaling is not None else query.shape[-1] ** -0.5
            columns = torch.zeros(query.shape[:3], device=query.device)
            for image in range(len(query)):
                own = patches[image]
                keys = key[image].float().repeat_interleave(groups, dim=0)
                logits = query[image][:, own].float() @ keys.transpose(1, 2) * scale  # (heads, patches, N)
                if mask is not None:
                    rule = mask[min(image, len(mask) - 1)][:, own]  # (1, patches, N)
                    logits = logits.masked_fill(~rule, float("-inf")) if rule.dtype == torch.bool else logits + rule
                columns[image] = logits.softmax(-1).sum(1) * own
            sums[layer] = columns

        return read

    before = config._attn_implementation
    config._attn_implementation = _COLUMNS
    for layer in layers:
        attentions[layer].samer_reader = reader_of(layer)
    try:
        yield sums
    finally:
        config._attn_implementation = before
        for layer in set(layers):
            del attentions[layer].samer_reader
