"""A small random NeoMME of transformers' own classes, as a folder: patches of 8 pixels. It needs torchvision."""

from __future__ import annotations

from pathlib import Path

import torch
from small_modernvbert import trained_words
from transformers import NeoMMEConfig, NeoMMEForRetrieval, NeoMMEImageProcessor, NeoMMEProcessor

PATCH, MASKS = 8, 4
SPECIALS = ["<pad>", "<unk>", "<mask>", "<query>", "<row>", "<doc>", "<img>"]
# Of the released one's form: a mark of the task first, then what the conversation holds, then masks behind a query.
TEMPLATE = (
    "{% for message in messages %}{% if task == 'query' %}<query>find: "
    "{% for part in message.content %}{{ part.text TRIM}}{% endfor %}<mask><mask><mask><mask>"
    "{% else %}<doc>{% for part in message.content %}<img>{% endfor %}{% endif %}{% endfor %}"
)


def save_neomme(folder: Path, *, padding_side: str = "right", trim: bool = False, most_side: int | None = 64) -> Path:
    """Writes a random NeoMME in float32 to `folder`; pictures have at most `most_side` pixels a side (None: any)."""
    named = {f"{name}_token": f"<{word}>" for name, word in (("image", "img"), ("document", "doc"), ("row", "row"))}
    tokenizer = trained_words(
        SPECIALS,
        padding_side=padding_side,
        mask_token="<mask>",
        unk_token="<unk>",
        extra_special_tokens={**named, "query_token": "<query>"},
    )
    processor = NeoMMEProcessor(
        image_processor=NeoMMEImageProcessor(patch_size=PATCH, max_side=most_side),
        tokenizer=tokenizer,
        chat_template=TEMPLATE.replace(" TRIM", " | trim " if trim else " "),
    )
    number = tokenizer.convert_tokens_to_ids
    config = NeoMMEConfig(
        vocab_size=len(tokenizer),
        embedding_rank=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        layer_types=["full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=6,
        patch_size=PATCH,
        embedding_dim=16,
        document_token_id=number("<doc>"),
        image_token_id=number("<img>"),
    )
    torch.manual_seed(4)
    model = NeoMMEForRetrieval(config)
    _fill(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def _fill(model: NeoMMEForRetrieval) -> None:
    """Weights in place of the zeros and small numbers of a fresh model, whose attention adds nothing at all."""
    for name, weight in model.named_parameters():
        if any(part in name for part in ("o_proj", "down_proj.weight", "value_embeddings", "alpha", "lambdas")):
            weight.normal_(std=0.3)
        elif "q_proj" in name or "k_proj" in name:
            weight.mul_(12)
