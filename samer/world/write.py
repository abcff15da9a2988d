"""The built-in world on disk, in Flickr30k-Entities layout."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

from samer.config import InputError
from samer.runtime.files import exists, is_dir, is_file, listing, opened, trouble
from samer.runtime.progress import Progress
from samer.world.kinds import STYLES, Scene
from samer.world.scenes import group_rng, make_group


def markup(parts: tuple[tuple[str, int | None, str], ...]) -> str:
    return " ".join(words if chain is None else f"[/EN#{chain}/{types} {words}]" for words, chain, types in parts)


def annotation(image_id: str, scene: Scene) -> bytes:
    """PASCAL VOC style XML with 1-based inclusive pixels."""
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = f"{image_id}.jpg"
    size = ElementTree.SubElement(root, "size")
    for name, value in (("width", scene.image.width), ("height", scene.image.height), ("depth", 3)):
        ElementTree.SubElement(size, name).text = str(value)
    for entity in scene.entities:
        for box in entity.boxes or (None,):
            node = ElementTree.SubElement(root, "object")
            ElementTree.SubElement(node, "name").text = str(entity.chain)
            if box is None:
                for flag in ("scene", "nobndbox"):
                    ElementTree.SubElement(node, flag).text = str(int(flag == entity.flag or flag == "nobndbox"))
            else:
                bounds = ElementTree.SubElement(node, "bndbox")
                values = (box[0] + 1, box[1] + 1, box[2], box[3])
                for name, value in zip(("xmin", "ymin", "xmax", "ymax"), values):
                    ElementTree.SubElement(bounds, name).text = str(value)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8") + b"\n"


def _write_group(job: tuple[str, str, int, int, int]) -> int:
    folder, style, seed, group, count = job
    root = Path(folder)
    scenes = make_group(style, seed, group)[:count]
    for number, scene in enumerate(scenes):
        image_id = f"{group * 2 + number + 1:08d}"
        scene.image.save(root / "images" / "Images" / f"{image_id}.jpg", quality=90)
        sentences = "".join(markup(caption) + "\n" for caption in scene.captions)
        (root / "annotations" / "Sentences" / f"{image_id}.txt").write_text(sentences, encoding="utf-8")
        (root / "annotations" / "Annotations" / f"{image_id}.xml").write_bytes(annotation(image_id, scene))
    return len(scenes)


def write_world(
    root: str | Path, counts: dict[str, int], *, style: str = "outdoor", seed: int = 0, workers: int | None = None
) -> bool:
    """Writes a generated world in Flickr30k-Entities layout (METHOD section 8); it appears whole or not at all.

    Args:
        root: the folder to make; kept as it is if it already holds this very world.
        counts: images per split, e.g. `{"train": 1000, "val": 100, "test": 500}`.
        style: `page` or `outdoor`.
        seed: fixes every pixel and word; the number of `workers` does not matter.

    Returns:
        True if the world was written, False if it was already there.

    Raises:
        InputError: unknown style, a count below 1, a folder that holds something else or can't be written.
    """
    root = Path(root)
    if style not in STYLES:
        raise InputError(f"scenes style '{style}' is unknown; use one of {', '.join(STYLES)}")
    for split, count in counts.items():
        if count < 1:
            raise InputError(f"scenes: {split} asks for {count} images; ask for at least 1")
    stamp = json.dumps({"generator": 1, "style": style, "seed": seed, "counts": counts}, indent=2) + "\n"
    if exists(root) and (not is_dir(root) or listing(root)):
        if is_file(root / "world.json") and _content(root / "world.json") == stamp.encode():
            return False
        raise InputError(f"{root} exists and holds something else; name another folder or remove it")
    partial = root.with_name(root.name + f".partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write_files(partial, counts, style, seed, workers)
        (partial / "world.json").write_text(stamp)
        if exists(root):
            root.rmdir()
        partial.rename(root)
    except OSError as error:
        raise trouble(root, error, "written") from None
    finally:  # nothing is left of an interrupted write; after the rename there is nothing to remove
        shutil.rmtree(partial, ignore_errors=True)
    return True


def _content(file: Path) -> bytes:
    try:
        with opened(file) as handle:
            return handle.read()
    except OSError as error:
        raise trouble(file, error) from None


def _write_files(partial: Path, counts: dict[str, int], style: str, seed: int, workers: int | None) -> None:
    for folder in ("images/Images", "annotations/Sentences", "annotations/Annotations"):
        (partial / folder).mkdir(parents=True)
    jobs: list[tuple[str, str, int, int, int]] = []
    group = 0
    for split, count in counts.items():
        ids: list[str] = []
        while len(ids) < count:
            twins = group_rng(style, seed, group).random() < STYLES[style].twins
            fit = min(1 + twins, count - len(ids))
            ids += [f"{group * 2 + k + 1:08d}" for k in range(fit)]
            jobs.append((str(partial), style, seed, group, fit))
            group += 1
        (partial / "annotations" / f"{split}.txt").write_text("".join(f"{i}\n" for i in ids))
    with ProcessPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        for _ in Progress(pool.map(_write_group, jobs, chunksize=16), "scenes", len(jobs)):
            pass
