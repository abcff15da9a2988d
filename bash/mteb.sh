#!/usr/bin/env bash
# Retrieval tasks of MTEB at one budget: scores beside vectors, bytes and seconds. Variables (default):
#   DATA_ROOT (data on this machine; or TASKS, names of MTEB's own tasks)   SPLITS (test)   CACHE_DIR (outputs/mteb)
#   ADAPTER_PATH (folder or hub id; empty: untouched)   BATCH_SIZE (8)   CACHE_DTYPE (bfloat16)   DEVICE (auto)
# e.g. DATA_ROOT=/data/vidore/docvqa bash bash/mteb.sh --main-score ndcg_at_5 merge.num_regions=64
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh, dash, zsh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

[ -n "${DATA_ROOT:-}${TASKS:-}" ] || { echo "error: neither DATA_ROOT nor TASKS is set; give a data set's folder: DATA_ROOT=DIR bash bash/mteb.sh" >&2; exit 2; }
prepare mteb
words "${TASKS:-}"
tasks=(${WORDS[@]+"${WORDS[@]}"})
words "${SPLITS:-test}"
exec "$PYTHON" "${REPO}scripts/tasks.py" ${DATA_ROOT:+--data-root="$DATA_ROOT"} \
    --cache-dir="${CACHE_DIR:-${REPO}outputs/mteb}" --adapter-path="${ADAPTER_PATH:-}" \
    --batch-size="${BATCH_SIZE:-8}" --cache-dtype="${CACHE_DTYPE:-bfloat16}" --device="${DEVICE:-auto}" \
    ${tasks[@]+--tasks "${tasks[@]}"} --splits "${WORDS[@]}" "$@"
