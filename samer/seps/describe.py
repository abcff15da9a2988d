"""Dense texts: a long description of every image of a split, by an image-text-to-text model of transformers.

A file of JSON lines that `seps.dense` reads, {"image_id", "text", "model_id", "metadata": {"length"}}, one after the
other as they are made; a run that was stopped goes on behind its last whole line. As published (LLaVA): top-p 0.9,
temperature 0.2, 500 new tokens at most, a prompt that asks for everything; its words are ours.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from samer.config import InputError
from samer.data.pictures import load_image
from samer.data.records import ImageRecord
from samer.runtime.files import is_file, only_writer, trouble
from samer.runtime.progress import Progress
from samer.runtime.signals import stop_here, stoppable

PROMPT = (
    "Describe this image comprehensively: every object and person with its colour, number, place and action, and the "
    "scene around them."
)


@dataclass(frozen=True)
class Wording:
    """How a model is asked; temperature 0 takes the likeliest token each time."""

    prompt: str = PROMPT
    max_new_tokens: int = 500
    temperature: float = 0.2
    top_p: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise InputError(
                "max_new_tokens must be at least 1, temperature at least 0 and top_p in (0, 1]; they are "
                f"{self.max_new_tokens}, {self.temperature}, {self.top_p}"
            )

    def generation(self) -> dict[str, Any]:
        """As transformers' generate takes it."""
        if not self.temperature:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        return {"max_new_tokens": self.max_new_tokens, **sampling}


def describe_images(
    records: Sequence[ImageRecord], output: Path, model: str, wording: Wording, device: torch.device
) -> int:
    """Describes the images that the file does not have yet.

    Returns:
        How many were described now.

    Raises:
        InputError: a model that is not there or describes no pictures, a picture that can't be read, a file of another
            model, an empty description.
        Stopped: SIGTERM came.
    """
    with only_writer(output.absolute().parent), stoppable():
        done = _whole_lines(output, model)
        todo = [record for record in records if record.image_id not in done]
        if not todo:
            return 0
        ask = _asker(model, wording, device)
        try:
            with open(output, "a", encoding="utf-8") as lines:
                for record in Progress(todo, desc="describing", unit="images"):
                    stop_here()
                    digest = hashlib.sha256(f"{wording.seed} {record.image_id}".encode()).digest()
                    torch.manual_seed(int.from_bytes(digest[:7], "big"))  # the same words whatever came before
                    text = " ".join(ask(load_image(record.image_path)).split())
                    if not text:
                        raise InputError(
                            f"{model} says nothing about {record.image_path}; take another prompt or model"
                        )
                    row = {
                        "image_id": record.image_id,
                        "text": text,
                        "model_id": model,
                        "metadata": {"length": len(text)},
                    }
                    lines.write(json.dumps(row, ensure_ascii=False) + "\n")
                    lines.flush()
        except OSError as error:
            raise trouble(output, error, "written") from None
        return len(todo)


def _whole_lines(output: Path, model: str) -> set[str]:
    """Image ids that the file has; a last line that was cut short is taken away.

    Raises:
        InputError: a line of another model, or none of ours.
    """
    if not is_file(output):
        return set()
    try:
        content = output.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(output, len(whole))
    except OSError as error:
        raise trouble(output, error) from None
    found = set()
    for number, line in enumerate(whole.decode("utf-8", errors="replace").split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
            image_id, made_by = row["image_id"], row["model_id"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{output}: line {number} is none that this script wrote; name another --out") from None
        if made_by != model:
            raise InputError(f"{output}: line {number} was written by {made_by}, not {model}; name another --out")
        found.add(image_id)
    return found


def _asker(model: str, wording: Wording, device: torch.device) -> Any:
    """A function from a picture to what the model says of it.

    Raises:
        InputError: the model can't be loaded, or is of another kind.
    """
    from transformers import pipeline

    try:
        asked = pipeline(
            "image-text-to-text", model=model, device=device, dtype="auto", model_kwargs={"use_safetensors": True}
        )
    except Exception as error:  # many types
        reason = " ".join(str(error).split())[:240]
        raise InputError(
            f"{model!r} can't be loaded as an image-text-to-text model ({reason}); name a hub id or a folder of one"
        ) from None
    chat = getattr(asked.processor, "chat_template", None) is not None

    def ask(image: Any) -> str:
        if chat:
            content = [{"type": "image", "image": image}, {"type": "text", "text": wording.prompt}]
            asking = {"text": [{"role": "user", "content": content}]}
        else:
            asking = {"images": image, "text": wording.prompt}
        (found,) = asked(**asking, return_full_text=False, generate_kwargs=wording.generation())
        return found["generated_text"]

    return ask
