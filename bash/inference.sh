#!/usr/bin/env bash
# Retrieval metrics of a cached split. Variables (default) and any flag, such as --folds 5 (COCO) or --sets (ImageCoDe):
#   CACHE_DIR (outputs/flickr_samer_k64)   SPLIT (test)   OUTPUT_JSON ($CACHE_DIR/metrics_$SPLIT.json)   DEVICE (auto)
#   DATA_ROOT (empty; else the report beside OUTPUT_JSON shows pictures)   FEATURES_DIR (empty: from the images)
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh, dash, zsh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

prepare
CACHE_DIR=${CACHE_DIR:-${REPO}outputs/flickr_samer_k64}
SPLIT=${SPLIT:-test}
exec "$PYTHON" "${REPO}scripts/eval.py" --cache-dir="$CACHE_DIR" --split="$SPLIT" --device="${DEVICE:-auto}" \
    ${DATA_ROOT:+--data-root="$DATA_ROOT"} --features="${FEATURES_DIR:-}" \
    --output-json="${OUTPUT_JSON:-$CACHE_DIR/metrics_$SPLIT.json}" "$@"
