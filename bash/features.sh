#!/usr/bin/env bash
# Computes the frozen hidden states once. Variables (default) and any flag or section.key=value override:
#   DATA_ROOT (required)   FEATURES_DIR (features/flickr_colpali)   SPLITS ("train val test")   BATCH_SIZE (32)
#   FEATURES_DTYPE (as the model computes: bfloat16 on a GPU)   NPROC_PER_NODE (1; more: torchrun)
#   NNODES, NODE_RANK, MASTER_ADDR (MASTER_PORT), or RDZV_ENDPOINT: several machines, as in bash/cache.sh
# --phrases: also of annotated phrases, which bash/compare.sh asks.
# Then: DATA_ROOT=... bash bash/train.sh data.features=features/flickr_colpali
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh, dash, zsh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

[ -n "${DATA_ROOT:-}" ] || { echo "error: DATA_ROOT is not set; give the data set's folder: DATA_ROOT=DIR bash bash/features.sh" >&2; exit 2; }
prepare
words "${SPLITS:-train val test}"
launch "${REPO}scripts/features.py" --data-root="$DATA_ROOT" --out="${FEATURES_DIR:-${REPO}features/flickr_colpali}" \
    --batch-size="${BATCH_SIZE:-32}" ${FEATURES_DTYPE:+--dtype="$FEATURES_DTYPE"} --splits "${WORDS[@]}" "$@"
