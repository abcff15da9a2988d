"""A small random LLaVA of transformers' own classes, as a folder: 8 x 8 patches of 32 pixels, words of a tiny BPE."""

from __future__ import annotations

from pathlib import Path

import torch
from small_modernvbert import trained_words
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def save_llava(folder: Path, *, chat: bool = True) -> Path:
    """Writes a random LLaVA in float32."""
    words = trained_words(["<pad>", "</s>", "<image>"], eos_token="</s>")
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=words,
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE if chat else None,
        num_additional_image_tokens=1,
    )
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=32, patch_size=4),
        text_config=LlamaConfig(**small, vocab_size=len(words), max_position_embeddings=256),
        image_token_index=2,
        image_token_id=2,
        vision_feature_layer=-1,
    )
    torch.manual_seed(4)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.lm_head.parameters():
            parameter.mul_(20)  # words differ from picture to picture
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 1
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
