#!/usr/bin/env bash
# Makes a retriever of two pretrained towers. Variables (default) and any section.key=value override:
#   DATA_ROOT (required)   CONFIG (configs/towers_224.yaml)   OUTPUT_DIR (the config's)   NPROC_PER_NODE (1; more: torchrun)
#   VISION TEXT (the config's; hub ids or folders)   FEATURES_DIR (computed, into OUTPUT_DIR/features;
#   or that of an earlier alignment of the same towers)
# Example: DATA_ROOT=/data/flickr30k_entities VISION=facebook/dinov2-base bash bash/align.sh align.epochs=30
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh, dash, zsh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

[ -n "${DATA_ROOT:-}" ] || { echo "error: DATA_ROOT is not set; give the data set's folder: DATA_ROOT=DIR bash bash/align.sh" >&2; exit 2; }
settings=("data.root=$DATA_ROOT")
while read -r variable key; do
    if [ -n "${!variable:-}" ]; then settings+=("$key=${!variable}"); fi
done <<'NAMES'
OUTPUT_DIR align.output_dir
VISION towers.vision
TEXT towers.text
FEATURES_DIR data.features
NAMES
prepare
launch "${REPO}scripts/align.py" --config="${CONFIG:-${REPO}configs/towers_224.yaml}" "${settings[@]}" "$@"
