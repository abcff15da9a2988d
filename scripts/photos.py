"""The evidence on photographs: a retriever of two towers, every compressor, the same training. See bash/photos.sh.

bash bash/photos.sh /data/flickr30k_entities                  (results in outputs/photos; hours, said beforehand)
bash bash/photos.sh DATA_ROOT --vision DIR --text DIR --sizes 224 --seeds 0

One half of train aligns the towers, the other trains projectors; val picks the retriever's epoch, test is measured.
Larger pictures start from the retriever of the first size. With --cutouts and --backgrounds the main rows are compared
on collages as well: there objects have the sizes that were asked for, while photographs are as they are. Scenes are few
and their captions simple, so their retriever has no layers of its own, and it and the projectors train on all of train.
Run again, it goes on where it stopped.
"""

import sys
from os.path import dirname, realpath

if not __package__:
    sys.path.insert(0, dirname(dirname(realpath(__file__))))
if __name__ == "__main__":
    from samer.runtime.early import heed_interrupts

    heed_interrupts()

import argparse
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from samer.runtime.commands import run

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "photos.yaml"
MANY = 512  # patches, from which on only the main rows are compared
FEW = ("untouched", "adapted", "phrases")  # sections of the comparison at few vectors
CRUDE = ("grid", "random")
MAIN = ("none", "samer", "querybank", "kmeans", "hpool", "sap-mean", "grid", "random")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_root", help="photographs in Flickr30k-Entities layout, with boxes: train, val, test")
    parser.add_argument("--out", default="outputs/photos", help="folder for everything (outputs/photos)")
    parser.add_argument("--vision", help="vision tower, a hub id or a folder (facebook/dinov2-small)")
    parser.add_argument("--text", help="text tower, likewise (sentence-transformers/all-MiniLM-L6-v2)")
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 448], help="pixels of a picture's side (224 448)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the trained rows (0 1 2)")
    parser.add_argument("--sections", nargs="+", default=[], help="of scripts/compare.py (all)")
    parser.add_argument("--methods", nargs="+", default=[], help="compressors (all; from 512 patches on the main ones)")
    parser.add_argument("--cutouts", nargs="+", default=[], help="folders of cut-outs with names, for collages")
    parser.add_argument("--backgrounds", nargs="+", default=[], help="folders of photographs behind them")
    parser.add_argument("--skip", nargs="+", default=[], metavar="NAME", help="cut-outs and backgrounds left out")
    parser.add_argument("--align", nargs="+", default=[], metavar="section.key=value", help="e.g. align.epochs=5")
    options = parser.parse_args(argv)
    if bool(options.cutouts) != bool(options.backgrounds):
        parser.error("--cutouts and --backgrounds go together")
    from samer.compare.plan import SECTIONS, check_request

    check_request(options.sections or SECTIONS, options.seeds, (), options.methods)
    out = Path(options.out)
    scenes = out / "collages" / "scenes" if options.cutouts else None
    if scenes:
        from scripts import collage

        words = ("--out", scenes, "--cutouts", *options.cutouts, "--backgrounds", *options.backgrounds)
        step("collages", collage, *words, *(("--skip", *options.skip) if options.skip else ()))
    tables = every_size(out / "photographs", PHOTOGRAPHS._replace(root=options.data_root, other=scenes), options)
    if scenes:
        tables += every_size(out / "collages", SCENES._replace(root=scenes, other=options.data_root), options)
    print("\n" + "\n".join(f"tables: {table}" for table in tables))
    return tables


class Pictures(NamedTuple):
    """A set of pictures: where it lies, another one, what is aligned and trained on and how, and the sections run."""

    aligned_on: str
    trained_on: str
    align: Sequence[str] = ()
    sections: Sequence[str] = ()
    root: str | Path = ""
    other: str | Path | None = None  # whose captions make a query bank of another domain


PHOTOGRAPHS = Pictures("train[:50%]", "train[50%:]")
SCENES = Pictures(
    "train",
    "train",
    (
        *("towers.vision_layers=0", "towers.text_layers=0", "align.captions=3", "align.phrases=2", "align.epochs=14"),
        *("align.patches=128", "align.learning_rate=2e-3", "align.images_per_step=32", "align.phrase_weight=1"),
    ),
    FEW,
)


def every_size(place, pictures, options):
    """The pages of tables; the first size's retriever is where the others start, for a quarter of its epochs."""
    pages, start = [], ()
    for size in options.sizes:
        pages += evidence(place / str(size), pictures, size, options, start)
        start = start or (f"align.start={place / str(size) / 'retriever'}", "align.epochs=5")
    return pages


def evidence(place, pictures, size, options, start):
    """A retriever for pictures of that size, what it gives, and the comparison; returns the pages of tables."""
    from samer.retrievers.hf import Retriever
    from scripts import align, compare, features

    retriever, aligned = place / "retriever", place / "features"
    towers = [f"towers.{name}={value}" for name in ("vision", "text") if (value := getattr(options, name))]
    config = ROOT / "configs" / ("towers_448.yaml" if size > 336 else "towers_224.yaml")
    towers.append(f"towers.image_size={size}")
    words = [f"data.root={pictures.root}", f"data.train_split={pictures.aligned_on}", f"align.output_dir={retriever}"]
    words += [*pictures.align, *start, *options.align]
    announce(place, config, [*towers, *words], options, pictures)
    step(f"align the towers, {size} pixels", align, "--config", config, *towers, *words)
    stored = [word.partition("=")[2] for word in options.align if word.startswith("align.features_dtype=")]
    words = ("--data-root", pictures.root, "--dtype", *(stored[-1:] or ["float16"]), "--phrases")
    own = ("--out", retriever / "features", *words, f"model.name={retriever / 'towers'}")
    step("what the towers give for all splits, once", features, *own)
    words = ("--out", aligned, "--towers", retriever / "features", *words, f"model.name={retriever}")
    step("what the adapters make of it", features, *words)
    rows, columns = Retriever.load(str(retriever)).grid
    asked = comparisons(rows * columns, options, pictures)
    if "banks" in (options.sections or ("banks",)):
        given = [f"{name}={file}" for name, file in banks(place / "banks", pictures, retriever).items()]
        asked["compare_banks"] = Comparison(max(2, rows * columns // 128), ("banks", "phrases"), banks=given)
    pages = []
    for name, each in asked.items():
        words = ("--data-root", pictures.root, "--out", place / name, "--features", aligned, "--config", CONFIG)
        words += (f"model.name={retriever}", f"data.train_split={pictures.trained_on}", *each.words(options.seeds))
        step(f"compare at K = {each.regions} of {rows * columns}", compare, *words)
        pages.append(place / name / "results.md")
    return pages


def banks(place, pictures, retriever):
    """Query banks that don't match what is asked: of few vectors, without half the words, of the other captions."""
    from samer.data import make_reader
    from samer.retrievers.banks import captions_of
    from samer.runtime.files import atomic_path
    from scripts import bank

    texts = {"own": captions_of(make_reader("flickr").load_split(pictures.root, pictures.trained_on, boxes=False))}
    texts["half its words"] = without_half(texts["own"])
    if pictures.other:
        texts["other pictures"] = captions_of(make_reader("flickr").load_split(pictures.other, "train", boxes=False))
    place.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, size in (("half its words", 2048), ("256 vectors", 256), ("other pictures", 2048)):
        if (lines := texts.get(name, texts["own"] if size == 256 else None)) is None:
            continue
        files[name] = place / f"{name.replace(' ', '_')}.safetensors"
        source = files[name].with_suffix(".txt")
        with atomic_path(source) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        words = ("--texts", source, "--size", size, "--out", files[name], f"model.name={retriever}")
        step(f"a query bank: {name}", bank, *words)
    return files


def without_half(texts):
    """The texts without half of their vocabulary, which its hash chooses."""
    words = sorted({word for text in texts for word in text.lower().split()})
    words.sort(key=lambda word: hashlib.sha256(word.encode()).digest())
    gone = set(words[: len(words) // 2])
    found = (" ".join(word for word in text.split() if word.lower() not in gone) for text in texts)
    return [text for text in found if text]


class Comparison(NamedTuple):
    """What is compared: as arguments of scripts/compare.py, of which empty ones mean all."""

    regions: int
    sections: Sequence[str] = ()
    methods: Sequence[str] = ()
    budgets: Sequence[int] = ()
    banks: Sequence[str] = ()

    def words(self, seeds):
        words = [f"merge.num_regions={self.regions}", "--seeds", *seeds]
        for name in ("sections", "methods", "budgets", "banks"):
            if value := getattr(self, name):
                words += [f"--{name}", *value]
        return words


def comparisons(patches, options, pictures):
    """By folder: at K = N / 16, and of the main rows at N / 128, where compressors differ most.

    Of many patches the main rows only: at N / 16 trained and not, and not trained at N / 32 and N / 64. H-Pool, whose
    tree takes 0.2 s for a picture of 1,024, is not trained through.
    """
    sections = options.sections or pictures.sections
    if patches <= MANY:
        methods = options.methods or (MAIN if pictures.sections else ())
        found = {"compare": Comparison(max(1, patches // 16), sections, methods)}
        if few := [name for name in FEW if name in (sections or FEW)]:
            found["compare_few"] = Comparison(max(2, patches // 128), few, options.methods or MAIN)
        return found
    trained = [name for name in ("untouched", "adapted") if name in (options.sections or ("untouched", "adapted"))]
    quick = [name for name in MAIN if name in (options.methods or MAIN) and name not in ("hpool", *CRUDE)]
    found = {"compare": Comparison(patches // 16, trained, quick)} if trained else {}
    if "untouched" in trained:
        for share in (16, 32, 64):
            methods = [name for name in MAIN if name in (options.methods or MAIN)]
            found[f"compare_{patches // share}"] = Comparison(patches // share, ("untouched",), methods)
    return found


def announce(place, align_file, words, options, pictures):
    """Says how long a size will take, by a few probes of this machine; nothing where all of it is done."""
    from samer.compare.forecast import Work, forecast
    from samer.compare.pace import spoken
    from samer.compare.plan import SECTIONS, plan, slug
    from samer.config import load_config
    from samer.data import reader_of
    from samer.data.parts import split_part, take_part
    from samer.retrievers.pretrained import load_towers
    from samer.retrievers.towers import TowerRetriever
    from samer.runtime.commands import pick_device
    from samer.training.align_settings import AlignConfig

    config = load_config(align_file, words, AlignConfig)
    model = TowerRetriever(config.towers, *load_towers(config.towers))
    asked = comparisons(model.side**2, options, pictures)
    if all((place / name / "results.md").is_file() for name in asked):
        return
    trainings = 0
    for each in asked.values():
        merge = load_config(CONFIG, [f"merge.num_regions={each.regions}"]).merge
        rows = plan(merge, model.side**2, each.budgets, each.methods)
        through = {slug(row.trained) for row in rows if row.trained and row.section in (each.sections or SECTIONS)}
        trainings += len(through) * len(options.seeds)
    read = reader_of(config.data).load_split
    splits = {name: read(config.data.root, name, boxes=False) for name in ("train", "val", "test")}
    aligned, trained = (take_part(splits["train"], split_part(part)[1], part) for part in pictures[:2])
    recipe, captions = load_config(CONFIG, []).train, sum(len(record.captions) for record in trained)
    work = Work(
        pictures=sum(map(len, splits.values())),
        aligned=len(aligned) * config.align.epochs,
        trainings=trainings,
        steps=recipe.num_train_epochs * captions // recipe.train_batch_size + 1,
        captions=recipe.train_batch_size,
        patches=config.align.patches,
    )
    seconds = forecast(model, work, pick_device())
    parts = ", ".join(f"{name} {spoken(value)}" for name, value in seconds.items())
    whole = spoken(sum(seconds.values()))
    print(
        f"\n{config.data.root}, {config.towers.image_size} pixels: about {whole} from the beginning "
        f"({work.pictures:,} pictures, {work.trainings} trainings: {parts}), give or take a half; written to {place}",
        flush=True,
    )


def step(title, script, *words):
    """Runs an entry point as the line that is printed would."""
    name = script.__name__.split(".")[-1]
    print(
        f"\n== {title}, {time.strftime('%H:%M')}\n   python scripts/{name}.py {' '.join(map(str, words))}", flush=True
    )
    return script.main([str(word) for word in words])


def command():
    run(main)


if __name__ == "__main__":
    command()
