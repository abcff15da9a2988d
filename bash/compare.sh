#!/usr/bin/env bash
# Compares every compressor at one budget and with the same training. Variables (default) and any flag or override:
#   DATA_ROOT (the built-in world, generated)   CONFIG (configs/demo.yaml; with DATA_ROOT configs/samer_k64_colpali.yaml)
#   OUTPUT_DIR (outputs/compare)   FEATURES_DIR (computed into OUTPUT_DIR/features)   SEEDS ("0 1 2")
#   NPROC_PER_NODE (1; more: torchrun, and a step has as many times the captions)   NNODES and so on as in bash/cache.sh
# e.g. DATA_ROOT=/data/flickr30k_entities FEATURES_DIR=features/flickr_colpali bash bash/compare.sh
# or fewer tables: bash bash/compare.sh --sections untouched adapted --methods none samer kmeans --budgets 64 16
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh, dash, zsh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

prepare
out=${OUTPUT_DIR:-${REPO}outputs/compare}
model=() # the config names the small retriever from the repo root
if [ -n "${DATA_ROOT:-}" ]; then
    config=${CONFIG:-${REPO}configs/samer_k64_colpali.yaml}
else
    DATA_ROOT=$out/world
    config=${CONFIG:-${REPO}configs/demo.yaml}
    if [ -z "${CONFIG:-}" ] && [ -n "$REPO" ]; then model=("model.name=${REPO}assets/retriever"); fi
    "$PYTHON" "${REPO}scripts/scenes.py" --out="$DATA_ROOT" --train 800 --val 60 --test 400
fi
words "${SEEDS:-0 1 2}"
# the list of seeds comes first: overrides that follow it would be taken for seeds
launch "${REPO}scripts/compare.py" --seeds "${WORDS[@]}" --data-root="$DATA_ROOT" --out="$out" \
    ${FEATURES_DIR:+--features="$FEATURES_DIR"} --config="$config" ${model[@]+"${model[@]}"} "$@"
