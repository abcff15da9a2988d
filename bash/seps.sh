#!/usr/bin/env bash
# Trains SEPS, or measures it. Variables (default) and any section.key=value override:
#   DATA_ROOT (data; holds f30k/ and coco/, or is one of them)   DATASET (f30k; or coco)
#   VIT_TYPE (vit; swin, vit_384, swin_384)   OUTPUT_DIR (checkpoints/seps_${DATASET}_$VIT_TYPE)
#   NPROC_PER_NODE (1; more: torchrun), NNODES, ... as in bash/cache.sh
#   STEP (train; eval: measure on the test split, with --folds=5 for COCO 1K; COCO 5K is 125,000,000 pairs)
#   and, where set, over the config's own value: BATCH_SIZE EMBED_SIZE SPARSE_RATIO AGGR_RATIO DENSE VARIANT DENSE_TEXTS
#   (a file or a folder of dense texts)
# Example: DATASET=coco VIT_TYPE=swin NPROC_PER_NODE=4 bash bash/seps.sh train.epochs=30, then the same with STEP=eval
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh, dash, zsh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

DATA_ROOT=${DATA_ROOT:-data}
DATASET=${DATASET:-f30k}
VIT_TYPE=${VIT_TYPE:-vit}
OUTPUT_DIR=${OUTPUT_DIR:-${REPO}checkpoints/seps_${DATASET}_$VIT_TYPE}
settings=()
while read -r variable key; do
    if [ -n "${!variable:-}" ]; then settings+=("$key=${!variable}"); fi
done <<'NAMES'
BATCH_SIZE train.batch_size
EMBED_SIZE towers.embed_size
SPARSE_RATIO seps.sparse_ratio
AGGR_RATIO seps.aggr_ratio
DENSE seps.dense
VARIANT seps.variant
DENSE_TEXTS data.dense
NAMES
prepare
if [ "${STEP:-train}" = train ]; then
    launch "${REPO}scripts/seps_train.py" --dataset="$DATASET" --data_path="$DATA_ROOT" --vit_type="$VIT_TYPE" \
        --logger_name="$OUTPUT_DIR" "${settings[@]}" "$@"
fi
root=$DATA_ROOT
if [ -d "$DATA_ROOT/$DATASET" ]; then root=$DATA_ROOT/$DATASET; fi
split=test
if [ "$DATASET" = coco ]; then split=testall; fi
settings=(data.name=captions)
if [ -n "${DENSE_TEXTS:-}" ]; then settings+=("data.dense=$DENSE_TEXTS"); fi
launch "${REPO}scripts/seps_eval.py" --model="$OUTPUT_DIR" --data-root="$root" --split="$split" \
    --out="$OUTPUT_DIR/$split" "${settings[@]}" "$@"
