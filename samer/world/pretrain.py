"""Pretraining of the retriever in assets/ on generated pages.

Shape letters: S scenes, B images, C captions, N image tokens, M caption tokens, P phrases, D embedding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import ColPaliForRetrieval, ColPaliProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from samer.losses import multi_positive_t2i_loss
from samer.metrics import retrieval_metrics
from samer.runtime.files import check_writable, trouble
from samer.scoring import maxsim
from samer.world.captions import caption_text
from samer.world.retriever import Geometry, build_colpali, page_texts, train_tokenizer
from samer.world.scenes import make_group

PHRASE_TEMPERATURE = 0.07

Caption = tuple[str, list[tuple[int, str, tuple[float, ...]]]]  # text, [(last character, name, box)] of its phrases


@dataclass
class Pages:
    """Rendered `page` scenes in memory: pixels (S, 3, H, W) uint8, and per scene five captions with boxed phrases."""

    pixels: torch.Tensor
    captions: list[list[Caption]]


def _render(job: tuple[str, int, int]) -> list[tuple[np.ndarray, list]]:
    style, seed, group = job
    processor = SiglipImageProcessorPil(size={"height": Geometry.image_size, "width": Geometry.image_size})
    rows = []
    for scene in make_group(style, seed, group):
        pixels = processor(scene.image, do_rescale=False, do_normalize=False)["pixel_values"][0]
        boxes = {entity.chain: entity.boxes[0] for entity in scene.entities if entity.boxes}
        scale = np.array([scene.image.width, scene.image.height] * 2, dtype=np.float64)
        captions = []
        for parts in scene.captions:
            text, spans = caption_text(parts)
            phrases = [
                # colour and kind name the thing; size and pattern words are optional
                (end - 1, " ".join(text[start:end].split()[-2:]), tuple(np.array(boxes[chain]) / scale))
                for chain, start, end in spans
                if chain in boxes
            ]
            captions.append((text, phrases))
        rows.append((np.clip(np.round(pixels), 0, 255).astype(np.uint8), captions))
    return rows


def render_pages(style: str, seed: int, groups: range) -> Pages:
    """Renders scene groups into memory at the small retriever's resolution."""
    jobs = [(style, seed, group) for group in groups]
    with ProcessPoolExecutor() as pool:
        rows = [row for batch in pool.map(_render, jobs, chunksize=32) for row in batch]
    pixels = torch.from_numpy(np.stack([row[0] for row in rows]))
    return Pages(pixels, [row[1] for row in rows])


def _phrase_loss(
    phrase_tokens: torch.Tensor,  # (P, D) unit
    image_tokens: torch.Tensor,  # (B, N, D) unit patches
    owners: torch.Tensor,  # (P,) image of each phrase
    boxes: torch.Tensor,  # (P, 4)
    names: Sequence[str],
) -> torch.Tensor:
    """Contrasts each phrase's last token with the patches in its box against all other patches of the batch.

    Patches of other images that lie in a box of the same name are left out: they are neither positive nor negative.
    """
    patch_xy = _patch_centres()  # (N, 2)
    inside = ((patch_xy[None] >= boxes[:, None, :2]) & (patch_xy[None] <= boxes[:, None, 2:])).all(-1)  # (P, N)
    codes = {name: k for k, name in enumerate(dict.fromkeys(names))}
    same_name = torch.tensor([codes[name] for name in names])
    same_name = same_name[:, None] == same_name[None]  # (P, P)
    own = owners[:, None] == torch.arange(len(image_tokens))[None]  # (P, B)
    positive = own[:, :, None] & inside[:, None]  # (P, B, N)
    alike = torch.einsum("pq,qbn->pbn", same_name.float(), positive.float()) > 0
    logits = torch.einsum("pd,bnd->pbn", phrase_tokens, image_tokens) / PHRASE_TEMPERATURE
    logits = logits.masked_fill(alike & ~positive, float("-inf")).flatten(1)
    positive = positive.flatten(1)
    keep = positive.any(1)
    log_share = logits[keep].log_softmax(1).masked_fill(~positive[keep], 0.0)
    return -(log_share.sum(1) / positive[keep].sum(1)).mean()


def _patch_centres() -> torch.Tensor:
    """Middles of the small retriever's patches, row by row, (N, 2) as (x, y)."""
    side = Geometry.image_size // Geometry.patch_size
    centres = (torch.arange(side) + 0.5) / side
    return torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1).reshape(-1, 2)


def evaluate_pages(model: ColPaliForRetrieval, processor: ColPaliProcessor, pages: Pages) -> dict[str, float]:
    """Text-to-image metrics of the uncompressed retriever on rendered pages (every caption is a query)."""
    model.eval()
    prompt = _image_prompt(processor)
    with torch.inference_mode():
        images = torch.cat([_embed_images(model, prompt, chunk) for chunk in pages.pixels.split(64)])
        texts = [caption[0] for captions in pages.captions for caption in captions]
        scores = []
        for start in range(0, len(texts), 250):
            inputs = processor(text=texts[start : start + 250])
            queries = model(**inputs, use_cache=False).embeddings
            scores.append(maxsim(queries.float(), images, inputs["attention_mask"].bool()))
    positives = torch.arange(len(pages.captions)).repeat_interleave(5)[:, None] == torch.arange(len(pages.captions))
    model.train()
    return retrieval_metrics(torch.cat(scores), positives)


def _image_prompt(processor: ColPaliProcessor) -> dict[str, torch.Tensor]:
    """The text side of one image's inputs, the same for every image."""
    from PIL import Image

    inputs = processor(images=[Image.new("RGB", (8, 8))])
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")}


def _embed_images(model: ColPaliForRetrieval, prompt: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """Unit image tokens (B, N, D) in float32 of uint8 pixels (B, 3, H, W)."""
    inputs = {name: value.expand(len(pixels), -1) for name, value in prompt.items()}
    values = (pixels.float() / 255 - 0.5) / 0.5
    return model(pixel_values=values, **inputs, use_cache=False).embeddings.float()


def pretrain(
    output: Path,
    *,
    steps: int,
    groups: int,
    batch_size: int = 32,
    captions_per_image: int = 2,
    lr: float = 1e-3,
    temperature: float = 0.02,
    phrase_weight: float = 0.5,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> dict[str, float]:
    """Pretrains the small retriever on generated pages and saves it (float16 safetensors) with its processor.

    The loss is the retrieval loss on all tokens plus, for this pretraining only, a contrast between each phrase's last
    token and the patches in its box. SaMer's own training never sees this term.

    Args:
        output: folder for model, processor and tokenizer.
        steps, batch_size, captions_per_image, lr: one-cycle AdamW.
        groups: how many page scenes to draw from.
        temperature: of the retrieval loss.
        phrase_weight: of the contrast.
        seed: fixes scenes, weights and batches.
        log: receives progress lines.

    Returns:
        Text-to-image metrics of the saved model on 500 held-out pages.
    """
    check_writable(output / "config.json")
    tokenizer = train_tokenizer(page_texts(400, seed), vocab_size=600)
    model, processor = build_colpali(tokenizer, Geometry(), seed)
    log(f"rendering {groups} pages")
    pages = render_pages("page", seed, range(groups))
    held_out = render_pages("page", seed, range(groups, groups + 500))
    outdoor = render_pages("outdoor", seed, range(370))
    prompt = _image_prompt(processor)
    optimizer, schedule = _optimizer(model, lr, steps)
    rng = np.random.default_rng(seed)
    order = np.empty(0, dtype=np.int64)
    model.train()
    started = time.time()
    for step in range(1, steps + 1):
        if len(order) < batch_size:
            order = rng.permutation(len(pages.captions))
        batch, order = order[:batch_size], order[batch_size:]
        chosen = [
            (image, pages.captions[scene][int(k)])
            for image, scene in enumerate(batch)
            for k in rng.permutation(5)[:captions_per_image]
        ]
        pixels = pages.pixels[torch.from_numpy(batch)]
        retrieval, grounding = _losses(model, processor, prompt, pixels, chosen, temperature)
        loss = retrieval + phrase_weight * grounding
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            pace = (time.time() - started) / step
            log(f"step {step}/{steps} retrieval {retrieval:.3f} phrase {grounding:.3f} {pace:.2f} s/step")
        if step % 500 == 0 or step == steps:
            clean, shifted = (evaluate_pages(model, processor, p) for p in (held_out, outdoor))
            log(f"step {step}: held-out pages R@1 {clean['r@1']:.1f}, outdoor R@1 {shifted['r@1']:.1f}")
            try:
                model.half().save_pretrained(output)
                processor.save_pretrained(output)
            except OSError as error:
                raise trouble(output, error, "written") from None
            model.float()
    return clean


def _optimizer(
    model: ColPaliForRetrieval, lr: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW, with decay of matrices only, and its one-cycle schedule."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.98)
    )
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)


def _losses(
    model: ColPaliForRetrieval,
    processor: ColPaliProcessor,
    prompt: dict[str, torch.Tensor],
    pixels: torch.Tensor,  # (B, 3, H, W) uint8
    chosen: list[tuple[int, Caption]],  # image of each caption, and the caption
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The retrieval loss of a batch, and the contrast of its phrases."""
    inputs = processor(text=[caption[0] for _, caption in chosen], return_offsets_mapping=True)
    offsets = inputs.pop("offset_mapping")
    with torch.autocast("cpu", torch.bfloat16):
        images = _embed_images(model, prompt, pixels)  # (B, N, D)
        queries = model(**inputs, use_cache=False).embeddings.float()  # (C, M, D)
    scores = maxsim(queries, images, inputs["attention_mask"].bool())
    owners = torch.tensor([image for image, _ in chosen])
    retrieval = multi_positive_t2i_loss(scores, owners[:, None] == torch.arange(len(pixels)), temperature)
    phrases = [(row, image, *phrase) for row, (image, caption) in enumerate(chosen) for phrase in caption[1]]
    rows, of, characters, names, boxes = zip(*phrases)
    grounding = _phrase_loss(
        queries[torch.tensor(rows), _tokens_at(offsets, processor, rows, characters)],
        images[:, : (Geometry.image_size // Geometry.patch_size) ** 2],
        torch.tensor(of),
        torch.tensor(boxes, dtype=torch.float32),
        names,
    )
    return retrieval, grounding


def _tokens_at(
    offsets: torch.Tensor, processor: ColPaliProcessor, rows: Sequence[int], characters: Sequence[int]
) -> torch.Tensor:
    """Positions (P,) of the tokens that hold a character of caption `row`; the query prefix is counted in here.

    Args:
        offsets: (C, M, 2) character offsets of every token in the processor's full query text.
    """
    prefix = len(processor.tokenizer.bos_token) + len(processor.query_prefix)
    spans = offsets[torch.tensor(rows)]  # (P, M, 2)
    at = torch.tensor(characters)[:, None] + prefix
    return ((spans[..., 0] <= at) & (at < spans[..., 1])).int().argmax(1)
