#!/usr/bin/env bash
# Builds the compressed index; reads no box file. Variables (default) and any flag or section.key=value override:
#   DATA_ROOT (required)   ADAPTER_PATH (folder or hub id; empty: untouched)   CACHE_DIR (outputs/flickr_samer_k64)
#   SPLITS ("val test")   BATCH_SIZE (32)   CACHE_DTYPE (bfloat16)   NPROC_PER_NODE (1; more: torchrun)
#   FEATURES_DIR (empty: encode the images; else a store made by bash/features.sh)
# Example: DATA_ROOT=/data/flickr30k_entities ADAPTER_PATH=checkpoints/samer_k64_colpali bash bash/cache.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

[ -n "${DATA_ROOT:-}" ] || { echo "error: DATA_ROOT is not set; give the Flickr30k-Entities folder: DATA_ROOT=DIR bash bash/cache.sh" >&2; exit 2; }
prepare
# SPLITS is a list of words on purpose
# shellcheck disable=SC2086
launch scripts/cache.py --data-root "$DATA_ROOT" --adapter-path "${ADAPTER_PATH:-}" \
    --cache-dir "${CACHE_DIR:-outputs/flickr_samer_k64}" --batch-size "${BATCH_SIZE:-32}" \
    --cache-dtype "${CACHE_DTYPE:-bfloat16}" --features "${FEATURES_DIR:-}" --splits ${SPLITS:-val test} "$@"
