#!/usr/bin/env bash
# Makes an index of pictures: a folder, parquet files, tar files of webdataset, or an address in object storage.
# Variables (default) and any flag or section.key=value override:
#   IMAGES (required)   CACHE_DIR (outputs/pictures)   ADAPTER_PATH (folder or hub id; empty: untouched)
#   CACHE_DTYPE (the index's own; int8)   BATCH_SIZE (32)   ENGINE (one process; ray: all GPUs of a Ray cluster)
#   PART (3/100: the third of a hundred indexes, in CACHE_DIR/part-00003; in a SLURM job array it need not be set;
#   python scripts/index.py --cache-dir DIR --merge-indexes CACHE_DIR/part-* joins them)
# Example: IMAGES=s3://bucket/pages ENGINE=ray bash bash/index.sh --adapter-path=checkpoints/samer_k64_colpali
# IMAGES=/data/pages CACHE_DIR=/data/index sbatch --array=0-99 --gpus=1 --wrap='bash bash/index.sh'
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh, dash, zsh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

[ -n "${IMAGES:-}" ] || { echo "error: IMAGES is not set; say where the pictures are: IMAGES=DIR bash bash/index.sh" >&2; exit 2; }
if [ "${ENGINE:-}" = ray ]; then prepare ray; else prepare; fi
CACHE_DIR=${CACHE_DIR:-${REPO}outputs/pictures}
part
exec "$PYTHON" "${REPO}scripts/index.py" --images="$IMAGES" --cache-dir="$CACHE_DIR" --adapter-path="${ADAPTER_PATH:-}" \
    --batch-size="${BATCH_SIZE:-32}" --cache-dtype="${CACHE_DTYPE:-}" ${ENGINE:+--engine="$ENGINE"} \
    ${PART_FLAG[@]+"${PART_FLAG[@]}"} "$@"
