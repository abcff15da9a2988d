#!/usr/bin/env bash
# Builds the compressed index; reads no box file. Variables (default) and any flag or section.key=value override:
#   DATA_ROOT (required)   ADAPTER_PATH (folder or hub id; empty: untouched)   CACHE_DIR (outputs/flickr_samer_k64)
#   SPLITS ("val test")   BATCH_SIZE (32)   CACHE_DTYPE (the index's own; bfloat16)   NPROC_PER_NODE (1; more: torchrun)
#   FEATURES_DIR (empty: encode the images; else a store made by bash/features.sh)
#   several machines, each of which runs this: NNODES, NODE_RANK, MASTER_ADDR (MASTER_PORT), or RDZV_ENDPOINT; under
#   SLURM nothing of it: srun --ntasks-per-node=1 bash bash/cache.sh
#   PART (3/100: the third of a hundred indexes, in CACHE_DIR/part-00003; in a SLURM job array it need not be set;
#   python scripts/index.py --cache-dir DIR --merge-indexes CACHE_DIR/part-* joins them)
# Example: DATA_ROOT=/data/flickr30k_entities ADAPTER_PATH=checkpoints/samer_k64_colpali bash bash/cache.sh
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh, dash, zsh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

[ -n "${DATA_ROOT:-}" ] || { echo "error: DATA_ROOT is not set; give the data set's folder: DATA_ROOT=DIR bash bash/cache.sh" >&2; exit 2; }
prepare
words "${SPLITS:-val test}"
CACHE_DIR=${CACHE_DIR:-${REPO}outputs/flickr_samer_k64}
part
launch "${REPO}scripts/cache.py" --data-root="$DATA_ROOT" --adapter-path="${ADAPTER_PATH:-}" \
    --cache-dir="$CACHE_DIR" --batch-size="${BATCH_SIZE:-32}" \
    --cache-dtype="${CACHE_DTYPE:-}" --features="${FEATURES_DIR:-}" ${PART_FLAG[@]+"${PART_FLAG[@]}"} --splits "${WORDS[@]}" "$@"
