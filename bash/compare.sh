#!/usr/bin/env bash
# Compares every compressor at one budget and with the same training. Variables (default) and any flag or override:
#   DATA_ROOT (the built-in world, generated)   CONFIG (configs/demo.yaml; with DATA_ROOT configs/samer_k64_colpali.yaml)
#   OUTPUT_DIR (outputs/compare)   FEATURES_DIR (computed into OUTPUT_DIR/features)   SEEDS ("0 1 2")
# e.g. DATA_ROOT=/data/flickr30k_entities FEATURES_DIR=features/flickr_colpali bash bash/compare.sh
# or fewer tables: bash bash/compare.sh --sections untouched adapted
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

prepare
out="${OUTPUT_DIR:-outputs/compare}"
if [ -n "${DATA_ROOT:-}" ]; then
    config="${CONFIG:-configs/samer_k64_colpali.yaml}"
else
    DATA_ROOT="$out/world"
    config="${CONFIG:-configs/demo.yaml}"
    "$PYTHON" scripts/scenes.py --out "$DATA_ROOT" --train 800 --val 60 --test 400
fi
# SEEDS is a list of words on purpose
# shellcheck disable=SC2086
exec "$PYTHON" scripts/compare.py --data-root "$DATA_ROOT" --out "$out" --config "$config" \
    ${FEATURES_DIR:+--features "$FEATURES_DIR"} --seeds ${SEEDS:-0 1 2} "$@"
