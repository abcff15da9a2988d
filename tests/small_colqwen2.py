"""A small random ColQwen2 of transformers' own classes, as a folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import ColQwen2Config, ColQwen2ForRetrieval, ColQwen2Processor, Qwen2Tokenizer, Qwen2VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from samer.world.retriever import page_texts

SIDE = 28  # pixels of a token's square
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
SPECIALS += ["<|video_pad|>"]


def small_tokenizer(padding_side: str = "right") -> Qwen2Tokenizer:
    """Byte-level BPE of a few hundred merges, with the special tokens of Qwen2-VL."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+| ?[^\s\p{L}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        page_texts(10, 0), trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    marks = {"additional_special_tokens": SPECIALS, "padding_side": padding_side}
    return Qwen2Tokenizer(vocab=model["vocab"], merges=merges, **marks)


def save_colqwen2(folder: Path, *, padding_side: str = "right", most_tokens: int = 24, layers: int = 5) -> Path:
    """Writes a random ColQwen2 in float32 to `folder`; a picture has at most `most_tokens` tokens by its processor."""
    tokenizer = small_tokenizer(padding_side)
    pictures = Qwen2VLImageProcessorPil(size={"shortest_edge": 4 * SIDE**2, "longest_edge": most_tokens * SIDE**2})
    processor = ColQwen2Processor(image_processor=pictures, tokenizer=tokenizer)
    number = tokenizer.convert_tokens_to_ids
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": number("<|im_end|>"),
        "pad_token_id": number("<|endoftext|>"),
    }
    marks = {f"{name}_token_id": number(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    marks |= {f"{name}_token_id": number(f"<|{name}_pad|>") for name in ("image", "video")}
    torch.manual_seed(1)
    model = ColQwen2ForRetrieval(
        ColQwen2Config(vlm_config=Qwen2VLConfig(text_config=text, vision_config=vision, **marks), embedding_dim=16)
    )
    with torch.no_grad():  # attention far from uniform, so that positions and layers matter
        for name, weight in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                weight.mul_(12)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
