#!/usr/bin/env bash
# Trains the projector. Variables (default) and any section.key=value override:
#   DATA_ROOT (required; its kind is guessed, data.name=coco says it)   NPROC_PER_NODE (1; more: torchrun)
#   CONFIG (configs/samer_k64_colpali.yaml; for ColQwen2 configs/samer_k64_colqwen2.yaml)
#   NNODES, NODE_RANK, MASTER_ADDR (MASTER_PORT), or RDZV_ENDPOINT: several machines, as in bash/cache.sh
#   RUN_NAME (samer_k64_colpali)   OUTPUT_DIR (checkpoints/$RUN_NAME)
#   and, where set, over the config's own value: MODEL_NAME LOCAL_FILES_ONLY TRAIN_BATCH_SIZE EVAL_BATCH_SIZE
#   GRAD_ACCUM_STEPS LEARNING_RATE NUM_TRAIN_EPOCHS BF16 REPORT_TO NUM_REGIONS CLUSTER_ITERS SPATIAL_WEIGHT
#   ASSIGNMENT_TEMPERATURE DATALOADER_NUM_WORKERS LIMIT_TRAIN_IMAGES LIMIT_EVAL_IMAGES
#   FEATURES_DIR (a store made by bash/features.sh: train from it instead of from pixels)
# Example: DATA_ROOT=/data/flickr30k_entities NPROC_PER_NODE=4 bash bash/train.sh train.seed=1
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh, dash, zsh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

[ -n "${DATA_ROOT:-}" ] || { echo "error: DATA_ROOT is not set; give the data set's folder: DATA_ROOT=DIR bash bash/train.sh" >&2; exit 2; }
RUN_NAME=${RUN_NAME:-samer_k64_colpali}
settings=("data.root=$DATA_ROOT" "train.run_name=$RUN_NAME" "train.output_dir=${OUTPUT_DIR:-${REPO}checkpoints/$RUN_NAME}")
while read -r variable key; do
    if [ -n "${!variable:-}" ]; then settings+=("$key=${!variable}"); fi
done <<'NAMES'
FEATURES_DIR data.features
MODEL_NAME model.name
LOCAL_FILES_ONLY model.local_files_only
TRAIN_BATCH_SIZE train.train_batch_size
EVAL_BATCH_SIZE train.eval_batch_size
GRAD_ACCUM_STEPS train.grad_accum_steps
LEARNING_RATE train.learning_rate
NUM_TRAIN_EPOCHS train.num_train_epochs
BF16 train.bf16
REPORT_TO train.report_to
NUM_REGIONS merge.num_regions
CLUSTER_ITERS merge.cluster_iters
SPATIAL_WEIGHT merge.spatial_weight
ASSIGNMENT_TEMPERATURE merge.assignment_temperature
DATALOADER_NUM_WORKERS train.dataloader_num_workers
LIMIT_TRAIN_IMAGES data.limit_train_images
LIMIT_EVAL_IMAGES data.limit_eval_images
NAMES
prepare
launch "${REPO}scripts/train.py" --config="${CONFIG:-${REPO}configs/samer_k64_colpali.yaml}" "${settings[@]}" "$@"
