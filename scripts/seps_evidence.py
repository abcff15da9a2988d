"""What is measured of SEPS: the leak on a generated data set, and photographs beside an index of merged vectors.

    python scripts/seps_evidence.py leak --out outputs/seps            (18 small trainings)
    python scripts/seps_evidence.py photos --out outputs/seps --data-root DIR --features STORE --model RETRIEVER
    python scripts/seps_evidence.py page --out outputs/seps --page assets/results/seps.md

leak: captions that leave out most of what is there, so that the best that a caption allows is known; the same training
without dense text, with the candidates' own, with that of the answer. photos: an aligned retriever's stored features
(bash/photos.sh makes both), on which SEPS's heads, and projectors of late interaction through SaMer or nothing, are
trained alike; pair-wise scores take every pair, an index does not. Results are in OUT/seps.json; run again, each goes
on where it stopped. How long a run took is shown; --seeds, --epochs and --regions make it shorter.
"""

import sys
from os.path import dirname, realpath

if not __package__:
    sys.path.insert(0, dirname(dirname(realpath(__file__))))
if __name__ == "__main__":
    from samer.runtime.early import heed_interrupts

    heed_interrupts()

import argparse
import time
from pathlib import Path

from samer.runtime.commands import add_compute_options, compute_device, run

VARIANTS, MODES = ("code", "paper"), ("none", "image", "query")
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "photos.yaml"
HEADS = {"laps": {}, "released": {"select_gradient": False}, "paper": {"variant": "paper"}}
TIMED = 64  # captions whose MaxSim is timed


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("leak", "photos", "page"))
    parser.add_argument("--out", default="outputs/seps", help="folder for everything (outputs/seps)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument("--epochs", type=int, help="of a SEPS training (leak 4, photos 4)")
    parser.add_argument("--train", type=int, default=2000, help="leak: pictures to train on (2000)")
    parser.add_argument("--test", type=int, default=300, help="leak: pictures to measure (300)")
    parser.add_argument("--data-root", help="photos: the data set, with train, val and test")
    parser.add_argument("--features", help="photos: store of the retriever's features of all splits")
    parser.add_argument("--model", help="photos: the retriever")
    parser.add_argument("--train-split", default="train[50%:]", help="photos: not aligned on (train[50%%:])")
    parser.add_argument("--regions", nargs="+", type=int, default=[16, 32, 64], help="photos: K (16 32 64)")
    parser.add_argument("--batch-size", type=int, default=64, help="photos: captions of a step (64)")
    parser.add_argument("--limit-images", type=int, help="photos: the first so many of val and of test")
    parser.add_argument("--page", default="assets/results/seps.md", help="page: the file")
    add_compute_options(parser)
    options = parser.parse_args(argv)
    if options.part == "photos" and not (options.data_root and options.features and options.model):
        parser.error("photos needs --data-root, --features and --model")
    device = compute_device(options)
    from samer.runtime.files import atomic_path, read_json

    out = Path(options.out)
    if options.part == "page":
        from samer.report.seps import seps_page

        with atomic_path(Path(options.page)) as temporary:
            temporary.write_text(seps_page(read_json(out / "seps.json")), encoding="utf-8")
        print(f"-> {options.page}")
        return options.page
    (leak if options.part == "leak" else photos)(out, options, device)
    print(f"\nwritten to {out / 'seps.json'}")
    return out / "seps.json"


def keep(out, part, facts, rows):
    """Writes what is known so far of a part, beside the other's."""
    from samer.runtime.files import is_file, read_json, write_json

    path = out / "seps.json"
    known = read_json(path) if is_file(path) else {}
    write_json(path, {**known, part: {**facts, "rows": rows}})


def announce(number, of, began, name):
    """Says which run begins, how long the one before took, and gives back when this one began."""
    now = time.monotonic()
    took = f"; the one before took {(now - began) / 60:.1f} min" if number else ""
    print(f"\n== {number + 1} of {of}: {name}{took}, {time.strftime('%H:%M')}", flush=True)
    return now


# --- the leak -------------------------------------------------------------------------------------------------------


def leak(out, options, device):
    from samer.seps.data import read_split
    from samer.seps.evaluate import evaluate_folder, recalls
    from samer.seps.settings import HeadSettings, SepsConfig, SepsData, SepsTowers, SepsTraining
    from samer.seps.train import train_seps
    from samer.world.leak import CELL, CELLS, ceiling, save_towers, write_leak

    place, epochs = out / "leak", options.epochs or 4
    write_leak(place / "data", {"train": options.train, "dev": 100, "test": options.test})
    vision, text = save_towers(place / "towers")
    towers = SepsTowers(vision, text, image_size=CELLS * CELL, embed_size=64)
    data = SepsData(str(place / "data"), name="captions")
    asked = read_split(data, "test", None, dense=True)
    best = ceiling([[c.text for c in record.captions] for record in asked.records], list(asked.dense.values()))
    facts = {"train": options.train, "test": options.test, "epochs": epochs, "ceiling": best}
    runs = [(variant, mode, seed) for variant in VARIANTS for mode in MODES for seed in options.seeds]
    rows, began = [], time.monotonic()
    for number, (variant, mode, seed) in enumerate(runs):
        began = announce(number, len(runs), began, f"{variant}, dense text {mode}, seed {seed}")
        folder = place / f"{variant}_{mode}_{seed}"
        rates = {"learning_rate": 5e-4, "tower_rate": 1.0, "decay_epochs": (epochs * 3 // 4,)}
        training = SepsTraining(str(folder), epochs, 32, sum_epochs=epochs, seed=seed, **rates)
        config = SepsConfig(towers, data, HeadSettings(variant, mode, aggr_ratio=1.0), training)
        train_seps(config, device)
        found = evaluate_folder(folder, config, "test", 1, folder / "test", device)
        rows.append({"variant": variant, "dense": mode, "seed": seed, **recalls(found)})
        keep(out, "leak", facts, rows)


# --- photographs ----------------------------------------------------------------------------------------------------


def photos(out, options, device):
    rows, began = [], time.monotonic()
    heads = [("LAPS-like: code, gradient by the chosen", "laps", regions) for regions in options.regions]
    heads.insert(1, ("SEPS none, code as released", "released", options.regions[0]))
    heads.insert(2, ("SEPS none, paper", "paper", options.regions[0]))
    indexed = [("late interaction, all patches", None), *(("SaMer", regions) for regions in options.regions)]
    runs = [(late, (*each, seed)) for each in indexed for seed in options.seeds]
    runs += [(pairwise, (*each, seed)) for each in heads for seed in options.seeds]
    facts = {"train_split": options.train_split, "epochs": options.epochs or 4, "limit_images": options.limit_images}
    for number, (measure, words) in enumerate(runs):
        began = announce(number, len(runs), began, ", ".join(map(str, words)))
        rows.append(measure(out / "photos", options, device, *words))
        keep(out, "photos", facts, rows)


def late(place, options, device, name, regions, seed):
    """Late interaction with the vectors that a compressor leaves, its projector trained through it."""
    import torch

    from samer.compressors import make_compressor
    from samer.config import load_config
    from samer.data import reader_of
    from samer.evaluation import both_directions, compress_images, encode_texts, join_queries, recall_sum, score_records
    from samer.features.read import open_encoder
    from samer.runtime.progress import batched
    from samer.scoring import maxsim
    from samer.seps.evaluate import recalls
    from samer.training.loop import train

    folder = place / f"late_{regions or 'all'}_{seed}"
    words = [f"data.root={options.data_root}", f"data.features={options.features}", f"model.name={options.model}"]
    words += [f"data.train_split={options.train_split}", f"train.seed={seed}"]
    words.append(f"train.train_batch_size={options.batch_size}")
    words += [f"merge.compressor={'samer' if regions else 'none'}", f"merge.num_regions={regions or 16}"]
    config = load_config(CONFIG, [*words, f"train.output_dir={folder}"])
    train(config)
    encoder = open_encoder(options.model, device, features=options.features, adapter_path=str(folder))
    read = reader_of(config.data).load_split
    records = read(options.data_root, "test", boxes=False, limit_images=options.limit_images)
    compressor = make_compressor(config.merge)
    scores = score_records(encoder, records, compressor, batch_size=50)
    image_of = torch.tensor([k for k, record in enumerate(records) for _ in record.captions])
    found = both_directions(scores, image_of)
    texts = [record.captions[0].text for record in records[:TIMED]]
    queries = join_queries(list(encode_texts(encoder, texts, len(texts))))
    images = [merged for *_, merged in compress_images(encoder, batched(records, 50), compressor)]
    began = time.monotonic()
    for merged in images:
        maxsim(queries.tokens, merged.tokens, queries.mask, merged.mask)
    pace = (time.monotonic() - began) / (len(texts) * len(records))
    count, width = images[0].tokens.shape[1:]
    cost = {"bytes_per_image": count * width * 2, "seconds_per_query_1m": pace * 1e6}
    return {"name": name, "k": regions, "seed": seed, **recalls({**found, "rsum": recall_sum(found)}), **cost}


def pairwise(place, options, device, name, kind, regions, seed):
    """SEPS without dense text whose pairs are scored by `regions` vectors."""
    from samer.retrievers.projectors import read_projector
    from samer.seps.evaluate import evaluate_folder, recalls
    from samer.seps.settings import HeadSettings, SepsConfig, SepsData, SepsTowers, SepsTraining
    from samer.seps.train import train_seps

    folder, settings = place / f"{kind}_{regions}_{seed}", HEADS[kind]
    width = len(read_projector(Path(options.features) / "base.safetensors").weight)
    data = SepsData(
        options.data_root,
        train_split=options.train_split,
        eval_split="val",
        features=options.features,
        limit_eval_images=options.limit_images,
    )
    patches = stored_patches(data, device)
    merged = regions if kind == "paper" else regions - 1  # and the dropped ones' mean
    head = HeadSettings(dense="none", sparse_ratio=0.5, aggr_ratio=(merged + 0.5) / (0.5 * patches), **settings)
    epochs = options.epochs or 4
    recipe = {
        "batch_size": options.batch_size,
        "learning_rate": 1e-3,
        "decay_epochs": (),
        "sum_epochs": epochs,
        "eval_block": 50,
    }
    training = SepsTraining(str(folder), epochs, seed=seed, **recipe)
    config = SepsConfig(SepsTowers(embed_size=width), data, head, training)
    train_seps(config, device)
    found = evaluate_folder(folder, config, "test", 1, folder / "test", device)
    cost = {each: found["cost"][each] for each in ("bytes_per_image", "seconds_per_query_1m")}
    return {"name": name, "k": regions, "seed": seed, **recalls(found), **cost}


def stored_patches(data, device):
    """Vectors of a stored picture."""
    from samer.data import reader_of
    from samer.seps.inputs import StoredInputs

    records = reader_of(data).load_split(data.root, "test", boxes=False, limit_images=1)
    return StoredInputs(data.features, device).pictures(records)["hidden"].shape[1]


def command():
    run(main)


if __name__ == "__main__":
    command()
