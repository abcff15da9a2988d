"""Small random towers of the real classes of transformers, as folders; and a small data set with boxes."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    BitImageProcessorPil,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SwinConfig,
    SwinModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

SIDE = 32  # pixels that the towers were made for
WORDS = [
    "a",
    "the",
    "red",
    "blue",
    "small",
    "dog",
    "cat",
    "ball",
    "boat",
    "man",
    "tree",
    "on",
    "under",
    "and",
    "in",
    ".",
]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
PLAIN = {"hidden_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 48}
PICTURE = {"image_size": SIDE, "patch_size": 4}

VISION = {  # name: model, picture processor
    "dinov2": lambda: (Dinov2Model(Dinov2Config(**_dino(), **PICTURE)), BitImageProcessorPil()),
    "registers": lambda: (
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**_dino(), **PICTURE, num_register_tokens=4)),
        BitImageProcessorPil(),
    ),
    "vit": lambda: (ViTModel(ViTConfig(**PLAIN, **PICTURE)), ViTImageProcessorPil()),
    "deit": lambda: (DeiTModel(DeiTConfig(**PLAIN, **PICTURE)), ViTImageProcessorPil()),
    "siglip": lambda: (
        SiglipModel(SiglipConfig(text_config={**PLAIN, "vocab_size": 64}, vision_config={**PLAIN, **PICTURE})),
        SiglipImageProcessorPil(),
    ),
    "swin": lambda: (
        SwinModel(
            SwinConfig(image_size=SIDE, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4)
        ),
        ViTImageProcessorPil(),
    ),
}
TEXT = {
    "bert": lambda vocab: BertModel(BertConfig(vocab_size=vocab, **PLAIN, max_position_embeddings=16)),
    "roberta": lambda vocab: RobertaModel(
        RobertaConfig(vocab_size=vocab, **PLAIN, max_position_embeddings=17, pad_token_id=0)
    ),
    "t5": lambda vocab: T5Model(
        T5Config(vocab_size=vocab, d_model=24, d_kv=12, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0)
    ),
    "distilbert": lambda vocab: DistilBertModel(
        DistilBertConfig(vocab_size=vocab, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=16)
    ),
}


def _dino() -> dict:
    return {name: value for name, value in PLAIN.items() if name != "intermediate_size"} | {"mlp_ratio": 2}


def small_tokenizer(words=WORDS, longest: int = 16) -> PreTrainedTokenizerFast:
    """One token a word, [CLS] before and [SEP] after, as BERT's has them."""
    vocab = {word: number for number, word in enumerate([*SPECIALS, *words])}
    plain = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    plain.normalizer = normalizers.Lowercase()
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=plain, model_max_length=longest, **named)


def save_vision(folder: Path, kind: str = "dinov2", seed: int = 0) -> Path:
    """A vision tower's folder."""
    torch.manual_seed(seed)
    model, pictures = VISION[kind]()
    model.save_pretrained(folder)
    pictures.save_pretrained(folder)
    return folder


def save_text(folder: Path, kind: str = "bert", seed: int = 0, words=WORDS) -> Path:
    """A text tower's folder."""
    torch.manual_seed(seed)
    tokenizer = small_tokenizer(words)
    TEXT[kind](len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
