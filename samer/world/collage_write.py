"""Collages on disk, in Flickr30k-Entities layout, with all that is known of them.

Beside what the layout asks for, a folder of collages holds
  collage.json               what it is made from and with; there from the start, so that the same command goes on
  scenes.json                every scene: its things, what its captions say, its twin; there when all is done
  annotations/relevant.json  image id -> for each of its captions, the other images of its split that it is true of
  SOURCES, licences/         where the pictures are from, and the licences found there
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from samer.config import InputError
from samer.runtime.files import (
    TEMPORARY,
    atomic_path,
    exists,
    is_dir,
    is_file,
    listing,
    only_writer,
    read_json,
    write_json,
)
from samer.runtime.progress import Progress
from samer.world.collage import MOST, Collage, Group, Studio, largest_size, make_group
from samer.world.collage_captions import Mention, Seen, Told, covers, holds
from samer.world.collage_names import Name
from samer.world.collage_sources import (
    Background,
    Cutout,
    Files,
    LeftOut,
    check_folders,
    counted,
    find_files,
    find_licences,
    take_backgrounds,
    take_cutouts,
)
from samer.world.write import annotation, markup

VERSION = 2
QUALITY = 90  # of JPEG
LEAST_SIZE = 96  # pixels: below it the smallest things are of a few
FEWEST_NAMES = 2 * MOST
_DONE = ".scenes"  # what is known of the scenes that are written, until all are


@dataclass(frozen=True)
class Order:
    """What is asked for.

    Attributes:
        cutouts, backgrounds: folders.
        counts: scenes by split.
        size: of a scene's sides, in pixels.
        seed: fixes every pixel and word.
        skip: names of folders and files that are not taken.
        separate: whether no thing of one split is in another, told apart by the last words of their names.
    """

    cutouts: tuple[str, ...]
    backgrounds: tuple[str, ...]
    counts: dict[str, int]
    size: int = 448
    seed: int = 0
    skip: tuple[str, ...] = ()
    separate: bool = False


def write_collages(root: str | Path, order: Order, *, workers: int | None = None) -> bool:
    """Writes collages; goes on where an earlier run of the same order was ended.

    Args:
        root: the folder to make.
        order: what is asked for.
        workers: processes; what is written does not depend on them.

    Returns:
        True if something was written, False if all was there already.

    Raises:
        InputError: a folder without pictures that can be used, too few of them, an order that can't be, a folder that
            holds something else or can't be written to.
    """
    root = Path(root)
    _check(order)
    cutouts = find_files(order.cutouts, order.skip)
    backgrounds = find_files(order.backgrounds, order.skip)
    check_folders(cutouts, backgrounds)
    stamp = _stamp(order, cutouts, backgrounds)
    there = exists(root) and (not is_dir(root) or any(not _stray(path) for path in listing(root)))
    if there and not (is_file(root / "collage.json") and read_json(root / "collage.json") == stamp):
        raise InputError(f"{root} exists and holds something else; name another folder or remove it")
    if is_file(root / "scenes.json"):
        shutil.rmtree(root / _DONE, ignore_errors=True)  # of a run that was ended in its last moment
        return False
    with only_writer(root):
        _write_all(root, order, cutouts, backgrounds, stamp, workers or min(8, os.cpu_count() or 1))
    return True


def _stray(path: Path) -> bool:
    """Whether a file is a lock, or half written by an earlier run that was killed."""
    return path.name == ".lock" or (path.name.startswith(".") and path.name.endswith(TEMPORARY))


def _check(order: Order) -> None:
    for split, count in order.counts.items():
        if count < 1:
            raise InputError(f"collages: {split} asks for {count} scenes; ask for at least 1")
    if order.size < LEAST_SIZE:
        raise InputError(f"collages: a size of {order.size} pixels; give at least {LEAST_SIZE}")
    if order.seed < 0:
        raise InputError(f"collages: the seed is {order.seed}; give 0 or more")


def _stamp(order: Order, cutouts: Files, backgrounds: Files) -> dict[str, Any]:
    """What fixes every byte that is written: the order and the content of the files, wherever they lie."""
    content = hashlib.blake2b(digest_size=16)
    for files in (cutouts, backgrounds):
        for source, digest in zip(files.found, files.digests):
            beside = files.path(source).with_suffix(".txt")
            name = beside.read_bytes() if files is cutouts and is_file(beside) else b""
            content.update(f"{source.folder}:{source.path}:{digest}:".encode() + hashlib.blake2b(name).digest())
    return {
        "generator": VERSION,
        "seed": order.seed,
        "size": order.size,
        "counts": order.counts,
        "separate_cutouts": order.separate,
        "skip": sorted(order.skip),
        "pictures": content.hexdigest(),
    }


def _write_all(root: Path, order: Order, cutouts: Files, backgrounds: Files, stamp: dict, workers: int) -> None:
    with tempfile.TemporaryDirectory(prefix="samer-collage-") as place, _pool(workers) as pool:
        things, left = take_cutouts(cutouts, Path(place), order.size, pool)
        left_out = [*cutouts.left_out, *left]
        _tell("cut-outs", len(things), left_out, order.cutouts, "each is a PNG with transparency, and a .txt beside it")
        grounds, left = take_backgrounds(backgrounds, Path(place), order.size, pool)
        left_grounds = [*backgrounds.left_out, *left]
        _tell("backgrounds", len(grounds), left_grounds, order.backgrounds, f"at least {order.size} pixels each way")
        groups = _groups(order, things, grounds)
        studio = Studio(tuple(things), tuple(grounds), order.size, order.seed)
        _tell_plan(root, order, studio, groups, workers)
        write_json(root / "collage.json", stamp)  # from here on the folder is this order's: nothing refuses it any more
        _write_groups(root, order, studio, groups, pool)
    splits = {split: list(chain.from_iterable(groups)) for split, groups in _ids(order).items()}
    relevant: dict[str, list[list[str]]] = {}
    scenes: dict[str, dict[str, Any]] = {}
    for split, ids in splits.items():
        own = {each: {"split": split, **read_json(root / _DONE / f"{each}.json")} for each in ids}
        relevant |= relevant_images(own, order.size)
        scenes |= own
    write_json(root / "annotations" / "relevant.json", relevant)  # before the lists that make a split of it
    for split, ids in splits.items():
        with atomic_path(root / "annotations" / f"{split}.txt") as temporary:
            temporary.write_text("".join(f"{each}\n" for each in ids), encoding="utf-8")
    _write_sources(root, order)
    _write_manifest(root, order, studio, scenes, {"cutouts": left_out, "backgrounds": left_grounds})
    shutil.rmtree(root / _DONE)


@contextmanager
def _pool(workers: int):
    """Processes; none takes up more work when something has failed."""
    pool = ProcessPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _tell(what: str, count: int, left_out: list[LeftOut], folders: Iterable[str], needs: str) -> None:
    """Says how many files were taken; raises InputError where none was."""
    told = counted(left_out, names=3)
    if not count:
        raise InputError(f"{', '.join(folders)}: no {what} that can be used: {told}; what is needed: {needs}")
    print(f"{count:,} {what} taken; left out: {told}", flush=True)


def _tell_plan(root: Path, order: Order, studio: Studio, groups: list[Group], workers: int) -> None:
    names = len({studio.cutouts[k].name.key for group in groups for k in group.cutouts})
    total = sum(order.counts.values())
    megapixels = total * order.size**2 / 1e6
    largest = min(largest_size([studio.cutouts[k] for k in group.cutouts]) for group in groups)
    print(
        f"writing {total:,} scenes of {order.size} x {order.size} pixels to {root}: things of {names:,} names, sizes "
        f"0.5 % to {100 * largest:.0f} %; about {0.28 * megapixels:,.0f} MB, {1.2 * megapixels / workers:,.0f} s",
        flush=True,
    )


def _ids(order: Order) -> dict[str, list[list[str]]]:
    """Image ids by split, of each group: two of twins, one where a split ends. Groups are numbered through all."""
    found, group = {}, 0
    for split, count in order.counts.items():
        ids = [f"{2 * group + k + 1:08d}" for k in range(count)]
        found[split] = [ids[k : k + 2] for k in range(0, count, 2)]
        group += len(found[split])
    return found


def _groups(order: Order, things: list[Cutout], grounds: list[Background]) -> list[Group]:
    """All pairs of twins: splits share no background, and no thing if so asked."""
    rng = np.random.default_rng([order.seed, 0])
    folders = ", ".join(order.backgrounds)
    if len(grounds) < len(order.counts):
        raise InputError(
            f"{folders}: {len(grounds)} backgrounds for {len(order.counts)} splits, which share none; give more"
        )
    shares = _shared(rng.permutation(len(grounds)).tolist(), list(order.counts.values()))
    names = sorted({thing.name.key for thing in things})
    parts = [set(names)] * len(shares)
    if order.separate:
        heads = sorted({name.split()[-1] for name in names})
        chosen = _shared([heads[k] for k in rng.permutation(len(heads))], list(order.counts.values()))
        parts = [{name for name in names if name.split()[-1] in part} for part in chosen]
    groups: list[Group] = []
    for (split, ids), share, part in zip(_ids(order).items(), shares, parts):
        if len(part) < FEWEST_NAMES:
            raise InputError(
                f"{', '.join(order.cutouts)}: cut-outs of {len(part)} names for {split}, {FEWEST_NAMES} are needed; "
                "give more, each with its name on the first line of a .txt beside it"
            )
        allowed = tuple(k for k, thing in enumerate(things) if thing.name.key in part)
        groups += [Group(len(groups) + k, share[k % len(share)], allowed, tuple(twins)) for k, twins in enumerate(ids)]
    return groups


def _shared(items: list, counts: list[int]) -> list[list]:
    """Items dealt out in proportion to some counts, at least one each."""
    ends = np.cumsum([0, *counts]) / sum(counts)
    spare = len(items) - len(counts)
    cuts = [round(float(end) * spare) + k for k, end in enumerate(ends)]
    return [items[start:end] for start, end in pairwise(cuts)]


def _write_groups(root: Path, order: Order, studio: Studio, groups: list[Group], pool: ProcessPoolExecutor) -> None:
    for folder in ("images/Images", "annotations/Sentences", "annotations/Annotations", _DONE):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for stray in filter(_stray, listing(root / folder)):
            stray.unlink()
    pictures = {path.stem for path in listing(root / "images/Images")}
    done = {path.stem for path in listing(root / _DONE)} & pictures
    if done:
        print(f"{len(done):,} scenes kept from an earlier try", flush=True)
    # in order of backgrounds, so that a worker opens one once
    groups = sorted(groups, key=lambda group: (group.background, group.number))
    missing = [group for group in groups if not done.issuperset(group.ids)]
    jobs = [pool.submit(_write_group, str(root), studio, group) for group in missing]
    with Progress(desc="collages", total=sum(len(group.ids) for group in missing), unit="scenes") as bar:
        for job in jobs:
            bar.update(job.result())


def _write_group(root: str, studio: Studio, group: Group) -> int:
    """Makes and writes a group, in a process of its own; the number of scenes."""
    for twin, collage in enumerate(make_group(studio, group)[: len(group.ids)]):
        _write_scene(Path(root), group, twin, collage)
    return len(group.ids)


def _write_scene(root: Path, group: Group, twin: int, collage: Collage) -> None:
    image_id = group.ids[twin]
    with atomic_path(root / "images" / "Images" / f"{image_id}.jpg") as temporary:
        collage.scene.image.save(temporary, "JPEG", quality=QUALITY)
    sentences = "".join(markup(caption) + "\n" for caption in collage.scene.captions)
    with atomic_path(root / "annotations" / "Sentences" / f"{image_id}.txt") as temporary:
        temporary.write_text(sentences, encoding="utf-8")
    with atomic_path(root / "annotations" / "Annotations" / f"{image_id}.xml") as temporary:
        temporary.write_bytes(annotation(image_id, collage.scene))
    left, top, side, flipped = collage.crop
    # written last: it says that the scene is whole
    facts = {
        "twin": group.ids[1 - twin] if len(group.ids) == 2 else None,
        "changed": collage.changed,
        "background": group.background,
        "crop": {"left": left, "top": top, "side": side, "flipped": flipped},
        "shadows": collage.shadows,
        "things": [_thing_facts(collage, k) for k in range(len(collage.things))],
        "captions": [_told_facts(told) for told in collage.told],
    }
    write_json(root / _DONE / f"{image_id}.json", facts)


def _thing_facts(collage: Collage, k: int) -> dict[str, Any]:
    layer, thing = collage.layers[k], collage.things[k]
    return {
        "chain": collage.chains[k][0],
        "name": thing.name.words,
        "determiner": thing.name.determiner,
        "cutout": layer.cutout,
        "size": round(layer.size, 5),
        "area": thing.area,
        "box": list(thing.box),
        "colours": thing.colours,
        "hides": {str(j): share for j, share in thing.hides.items()},
        "flipped": layer.flipped,
        "turned": layer.turned,
        "blur": layer.blur,
    }


def _told_facts(told: Told) -> dict[str, Any]:
    mentions = []
    for mention in told.mentions:
        said = {"size": mention.size, "colour": mention.colour, "place": mention.place}
        mentions.append({"thing": mention.thing, **{key: word for key, word in said.items() if word}})
    text = " ".join(words for words, _, _ in told.parts)
    return {"text": text, "mentions": mentions, **({"relation": told.relation} if told.relation else {})}


def relevant_images(scenes: dict[str, dict[str, Any]], size: int) -> dict[str, list[list[str]]]:
    """Of each scene's captions, the other scenes that they are true of; scenes as `scenes.json` has them."""
    things = {each: _seen(facts) for each, facts in scenes.items()}
    holding: dict[str, set[str]] = {}
    for each, seen in things.items():
        for thing in seen:
            holding.setdefault(thing.name.key, set()).add(each)

    @cache
    def with_name(key: str) -> frozenset[str]:
        return frozenset().union(*(ids for other, ids in holding.items() if covers(key, other)))

    found = {}
    for each, facts in scenes.items():
        own = things[each]
        found[each] = []
        for caption in facts["captions"]:
            told = _told(caption)
            candidates = frozenset.intersection(*(with_name(own[m.thing].name.key) for m in told.mentions))
            others = sorted(candidates - {each})
            found[each].append([other for other in others if holds(told, own, things[other], size)])
    return found


def _seen(facts: dict[str, Any]) -> list[Seen]:
    return [
        Seen(
            Name(thing["determiner"], thing["name"]),
            tuple(thing["box"]),
            thing["area"],
            thing["colours"],
            {int(k): share for k, share in thing["hides"].items()},
        )
        for thing in facts["things"]
    ]


def _told(caption: dict[str, Any]) -> Told:
    mentions = tuple(Mention(**said) for said in caption["mentions"])
    return Told(mentions, caption.get("relation", ""), ())


def _write_sources(root: Path, order: Order) -> None:
    """Lists the folders that pictures are from, and copies the licences found there."""
    lines = []
    for what, folders in (("cut-outs", order.cutouts), ("backgrounds", order.backgrounds)):
        for folder in folders:
            lines.append(f"{what} from {folder}")
            licences = find_licences(folder)
            if not licences:
                lines.append("  no LICENSE, COPYING or copyright file was found there: find out what may be shown")
            for licence in licences:
                content = licence.read_bytes()
                parent = licence.parent.name or "root"
                name = f"{parent}-{licence.name}-{hashlib.blake2b(content, digest_size=4).hexdigest()}"
                with atomic_path(root / "licences" / name) as temporary:
                    temporary.write_bytes(content)
                lines.append(f"  {licence}: see licences/{name}")
    with atomic_path(root / "SOURCES") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_manifest(
    root: Path, order: Order, studio: Studio, scenes: dict[str, dict[str, Any]], left_out: dict[str, list[LeftOut]]
) -> None:
    manifest = {
        "generator": VERSION,
        "seed": order.seed,
        "size": order.size,
        "folders": {"cutouts": list(order.cutouts), "backgrounds": list(order.backgrounds)},
        "cutouts": [
            {"folder": each.source.folder, "path": each.source.path, "name": each.name.phrase(), "type": each.kind}
            for each in studio.cutouts
        ],
        "backgrounds": [{"folder": each.source.folder, "path": each.source.path} for each in studio.backgrounds],
        "left_out": {
            what: [{"folder": e.source.folder, "path": e.source.path, "reason": e.reason} for e in files]
            for what, files in left_out.items()
        },
    }
    head = json.dumps(manifest, ensure_ascii=False, indent=1).removesuffix("\n}")
    lines = [  # one a scene
        f"  {json.dumps(each)}: {json.dumps(facts, ensure_ascii=False)}" for each, facts in scenes.items()
    ]
    with atomic_path(root / "scenes.json") as temporary:
        temporary.write_text(head + ',\n "scenes": {\n' + ",\n".join(lines) + "\n }\n}\n", encoding="utf-8")
