"""A small data set on which a description gives away what a caption leaves out, and small towers to learn it with.

Five things lie in a picture's 4 x 4 cells, a thing being a coloured shape, one of 48. A caption names two of the five;
the dense text names all. So a caption fits many pictures, and how often the right one can come first is known exactly
(`ceiling`), whatever a system makes of it; only a description of the answer goes beyond. Files lie as the caption files
of SEPS do.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from samer.runtime.files import atomic_path, is_file, write_json

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 50),
    "purple": (150, 60, 190),
    "white": (245, 245, 245),
    "pink": (250, 150, 190),
    "cyan": (40, 200, 210),
}
SHAPES = ("square", "disc", "cross", "bar", "post", "ring")
THINGS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
CELLS, CELL = 4, 8  # per side; pixels
HELD, NAMED, CAPTIONS = 5, 2, 5  # things of a picture, of a caption; captions of a picture
GROUND = (60, 60, 60)


def _draw(things: Sequence[str], cells: Sequence[int]) -> Image.Image:
    image = Image.new("RGB", (CELLS * CELL, CELLS * CELL), GROUND)
    pen = ImageDraw.Draw(image)
    for thing, cell in zip(things, cells):
        colour, shape = thing.split()
        x, y = CELL * (cell % CELLS), CELL * (cell // CELLS)
        fill = COLOURS[colour]
        if shape == "square":
            pen.rectangle((x + 1, y + 1, x + 6, y + 6), fill=fill)
        elif shape == "disc":
            pen.ellipse((x, y, x + 7, y + 7), fill=fill)
        elif shape == "cross":
            pen.line((x, y, x + 7, y + 7), fill=fill, width=2), pen.line((x, y + 7, x + 7, y), fill=fill, width=2)
        elif shape == "ring":
            pen.ellipse((x, y, x + 7, y + 7), outline=fill)
        elif shape == "bar":
            pen.rectangle((x, y + 3, x + 7, y + 4), fill=fill)
        else:
            pen.rectangle((x + 3, y, x + 4, y + 7), fill=fill)
    return image


def _told(things: Sequence[str]) -> str:
    return " and ".join(f"a {thing}" for thing in things)


def write_leak(folder: str | Path, counts: dict[str, int], seed: int = 0) -> None:
    """Writes the data set, unless it is there: pictures, `SPLIT_caps.txt`, `SPLIT_ids.txt`, `leak_SPLIT.jsonl`."""
    folder = Path(folder)
    if is_file(folder / "id_mapping.json"):
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lot, number, names = random.Random(seed), itertools.count(), {}
    for split, count in counts.items():
        ids, captions, dense = [], [], []
        for _ in range(count):
            image_id = next(number)
            things = lot.sample(THINGS, HELD)
            names[str(image_id)] = f"{image_id:06d}.png"
            with atomic_path(folder / "images" / names[str(image_id)]) as temporary:
                _draw(things, lot.sample(range(CELLS * CELLS), HELD)).save(temporary, format="PNG")
            ids.append(str(image_id))
            pairs = lot.sample(list(itertools.combinations(things, NAMED)), CAPTIONS)
            captions += [_told(lot.sample(pair, NAMED)) for pair in pairs]
            dense.append(json.dumps({"text": _told(things)}))
        for name, lines in ((f"{split}_ids.txt", ids), (f"{split}_caps.txt", captions), (f"leak_{split}.jsonl", dense)):
            with atomic_path(folder / name) as temporary:
                temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "id_mapping.json", names)


def ceiling(captions: Sequence[Sequence[str]], dense: Sequence[str]) -> dict[str, float]:
    """The highest R@1, R@5 and R@10 that the captions allow, text to image, in percent.

    Of m pictures that hold what a caption names, the right one comes among the first k with chance min(1, k / m).

    Args:
        captions: of each picture.
        dense: the description of each.
    """
    held = [set(text.removeprefix("a ").split(" and a ")) for text in dense]
    named = [set(text.removeprefix("a ").split(" and a ")) for own in captions for text in own]
    fits = [sum(things <= each for each in held) for things in named]
    return {f"r@{k}": round(100 * sum(min(1.0, k / m) for m in fits) / len(fits), 6) for k in (1, 5, 10)}


def save_towers(folder: str | Path, seed: int = 0) -> tuple[str, str]:
    """Writes a small random ViT, a patch a cell, and a small random BERT that knows the words; returns both folders."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, ViTConfig, ViTImageProcessorPil, ViTModel

    places = Path(folder) / "vision", Path(folder) / "text"
    if not is_file(places[1] / "config.json"):
        torch.manual_seed(seed)
        size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        ViTModel(ViTConfig(**size, image_size=CELLS * CELL, patch_size=CELL)).save_pretrained(places[0])
        ViTImageProcessorPil().save_pretrained(places[0])
        specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        vocab = {word: k for k, word in enumerate([*specials, "a", "and", *COLOURS, *SHAPES])}
        plain = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
        plain.pre_tokenizer = pre_tokenizers.Whitespace()
        ends = [(name, vocab[name]) for name in ("[CLS]", "[SEP]")]
        plain.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
        named = {f"{name.strip('[]').lower()}_token": name for name in specials}
        words = PreTrainedTokenizerFast(tokenizer_object=plain, model_max_length=64, **named)
        words.save_pretrained(places[1])
        BertModel(BertConfig(vocab_size=len(vocab), **size, max_position_embeddings=64)).save_pretrained(places[1])
    return str(places[0]), str(places[1])
