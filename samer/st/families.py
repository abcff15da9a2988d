"""Which family of ours a model of sentence-transformers is of, and what has to be repaired in it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from torch import nn

from samer.config import InputError
from samer.retrievers import FAMILIES, Family
from samer.retrievers.colpali import ColPali
from samer.retrievers.colqwen2 import MODEL_MASK, ColQwen2
from samer.retrievers.modernvbert import ColModernVBert
from samer.retrievers.neomme import NeoMME

# Families by the type of their inner model, which is what a pipeline with a Dense of its own runs.
INNER: dict[str, type[Family]] = {
    "paligemma": ColPali,
    "qwen2_vl": ColQwen2,
    "modernvbert": ColModernVBert,
    "neomme": NeoMME,
}
_WHOLE = (ColPali, ColQwen2)  # whose ForRetrieval class sentence-transformers gives the right prompts


def transformer_of(model: MultiVectorEncoder) -> Transformer:
    found = next((module for module in model if isinstance(module, Transformer)), None)
    if found is None:
        raise InputError("this model has no Transformer of sentence-transformers, so SaMer can't tell its family")
    return found


def family_of(model: MultiVectorEncoder) -> Family | None:
    """The family of a pipeline's model, whole or without its projection; None: none of ours.

    Raises:
        InputError: a family whose pictures sentence-transformers can't prepare as they must be.
    """
    transformer = transformer_of(model)
    inner, processor = transformer.model, transformer.processor
    whole = FAMILIES.get(type(inner).__name__)
    if whole is not None:
        if not issubclass(whole, _WHOLE):
            raise InputError(
                f"sentence-transformers does not give {whole.architecture} the prompts of its pictures; "
                "write a pipeline that does with samer.st.save"
            )
        return whole(inner, processor)
    kind = INNER.get(inner.config.model_type)
    if kind is None:
        return None
    config = inner.config if kind is NeoMME else SimpleNamespace(vlm_config=inner.config)
    return kind(SimpleNamespace(config=config, vlm=inner, model=inner), processor)


class Positions:
    """A hook of a Transformer that adds the positions of pictures to what a ColQwen2 of transformers is given.

    The Transformer calls its model's `forward` past the model's own hooks.
    """

    def __init__(self, family: ColQwen2) -> None:
        self.family = family

    def __call__(self, _: nn.Module, arguments: tuple[dict[str, Any], ...]) -> None:
        features = arguments[0]
        self.family.backbone.rope_deltas = None  # of another batch
        if "image_grid_thw" in features:
            inputs = {**features, MODEL_MASK: features["attention_mask"]}
            features["position_ids"] = self.family.positions(inputs)


def repair(model: MultiVectorEncoder) -> Family | None:
    """Gives a ColQwen2 of transformers the positions of pictures, and leaves the prompt out of its vectors; once.

    Returns:
        The model's family, of which others need no repair; None: none of ours.

    Raises:
        InputError: as `family_of`.
    """
    transformer, family = transformer_of(model), family_of(model)
    if not isinstance(family, ColQwen2) or type(transformer.model).__name__ != family.architecture:
        return family
    if not any(isinstance(hook, Positions) for hook in transformer._forward_pre_hooks.values()):
        transformer.register_forward_pre_hook(Positions(family))
    for module in model:
        if isinstance(module, MultiVectorMask):
            module.keep_only_token_ids = [family.image_token_id]
    return family
