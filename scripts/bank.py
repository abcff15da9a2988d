"""Makes a query bank, what merge.compressor=querybank compresses images by: tokens of captions or of asked queries.

    python scripts/bank.py --texts queries.txt --adapter-path checkpoints/samer_k64_colpali --out queries.safetensors
    python scripts/bank.py --data-root /data/flickr30k_entities --split train --features features/flickr_colpali \\
        model.name=vidore/colpali-v1.3-hf --out bank.safetensors

--texts is any file with a caption or query a line; a line that comes again counts again. A bank belongs to the model
and the projector it was made with: give it to scripts/cache.py or scripts/index.py as --bank, or let it lie beside the
projector as bank.safetensors, where both find it. scripts/train.py leaves one there when it trains through querybank.
"""

import sys
from os.path import dirname, realpath

if not __package__:
    sys.path.insert(0, dirname(dirname(realpath(__file__))))
if __name__ == "__main__":
    from samer.runtime.early import heed_interrupts

    heed_interrupts()

import argparse

from samer.runtime.commands import DATA_KINDS, add_compute_options, compute_device, compute_dtype, run


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--texts", metavar="FILE", help="captions or queries, one a line")
    source.add_argument("--data-root", help="a data set's folder, whose captions are taken; boxes are not read")
    parser.add_argument("--reader", help=DATA_KINDS)
    parser.add_argument("--split", help="of the data set (data.train_split: train)")
    parser.add_argument("--out", required=True, help="the bank's file, such as ADAPTER_PATH/bank.safetensors")
    parser.add_argument("--size", type=int, help="vectors at most (merge.bank_size: 2048)")
    parser.add_argument("--adapter-path", default="", help="trained projector: folder or hub id; empty: untouched")
    parser.add_argument("--features", default="", help="feature store to read the texts from (scripts/features.py)")
    parser.add_argument("--batch-size", type=int, default=32, help="texts per forward pass (32)")
    add_compute_options(parser, "--dtype")
    parser.add_argument("--config", help="YAML file with model settings")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. model.name=assets/retriever")
    options = parser.parse_args(argv)
    if options.size is not None and options.size < 1:
        parser.error("--size must be at least 1")
    if options.batch_size < 1:
        parser.error("--batch-size must be at least 1")
    if options.texts and (options.split or options.reader):
        parser.error("--split and --reader go with --data-root")
    from dataclasses import replace

    from samer.data import training_records
    from samer.features.read import open_encoder
    from samer.index.settings import adapter_config
    from samer.retrievers.banks import captions_of, query_states, read_texts, save_bank
    from samer.runtime.files import check_writable

    config = adapter_config(options.adapter_path, options.config, options.overrides)
    check_writable(options.out)
    if options.texts:
        texts, source = read_texts(options.texts), f"lines of {options.texts}"
    else:
        data = replace(config.data, root=options.data_root, reader="", name=options.reader or config.data.name)
        split = options.split or data.train_split
        if split != data.train_split:  # what limits and chooses is meant for that one
            data = replace(data, train_split=split, captions="", limit_train_images=None)
        records = training_records(data, boxes=False)
        texts = captions_of(records)
        source = f"captions of {split} in {options.data_root}"
    encoder = open_encoder(
        config.model.name,
        compute_device(options),
        features=options.features,
        dtype=compute_dtype(options),
        adapter_path=options.adapter_path,
        local_files_only=config.model.local_files_only,
        revision=config.model.revision,
    )
    states = query_states(encoder, texts, options.size or config.merge.bank_size, source, options.batch_size)
    bank = states.bank(encoder.current_projector())
    save_bank(options.out, bank)
    print(f"{options.out}: {bank.describe()}")
    return bank


def command():
    run(main)


if __name__ == "__main__":
    command()
