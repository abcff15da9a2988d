#!/usr/bin/env bash
# The evidence on photographs, from two pretrained towers to the tables; every step goes on where it was stopped.
#   bash bash/photos.sh DATA_ROOT [VARIABLE...]
# DATA_ROOT: photographs in Flickr30k-Entities layout with boxes: train, val, test. Variables (default):
#   VISION TEXT (the hub's DINOv2-S and MiniLM-L6; or folders)   OUTPUT_DIR (outputs/photos)   SEEDS ("0 1 2")
#   SIZES ("224 448": 256 and 1,024 patches)   CUTOUTS BACKGROUNDS (folders: the same on collages made of them, too)
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh, dash, zsh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

data=${1:-${DATA_ROOT:-}}
[ -n "$data" ] || { echo "error: name the data set's folder: bash bash/photos.sh DATA_ROOT" >&2; exit 2; }
[ $# -eq 0 ] || shift
prepare
out=${OUTPUT_DIR:-${REPO}outputs/photos}
towers=(${VISION:+"towers.vision=$VISION"} ${TEXT:+"towers.text=$TEXT"})
words "${SEEDS:-0 1 2}"
seeds=("${WORDS[@]}")
words "${SIZES:-224 448}"
sizes=("${WORDS[@]}")
echo "photographs of $data -> $out, ${#sizes[@]} sizes, ${#seeds[@]} seeds; with 4,800 pictures on 2 cores about"
echo "4 hours for 224 pixels (towers 0.2, alignment 0.5, comparison 3) and 6 for 448; each step says how long it will take"

# evidence NAME DATA SIZE: a retriever aligned on one half of train, what it gives, and the comparison
evidence() {
    local root=$2 size=$3 here=$out/$1/$3 tokens=$((($3 / 14) * ($3 / 14))) rows=()
    local retriever=$here/retriever
    echo "== $1, $size pixels, $tokens patches -> $here"
    "$PYTHON" "${REPO}scripts/align.py" --config="${REPO}configs/towers_$size.yaml" "data.root=$root" \
        'data.train_split=train[:50%]' "align.output_dir=$retriever" ${towers[@]+"${towers[@]}"}
    "$PYTHON" "${REPO}scripts/features.py" --out="$retriever/features" --data-root="$root" --dtype=float16 --phrases \
        --splits train val test "model.name=$retriever/towers"
    "$PYTHON" "${REPO}scripts/features.py" --out="$here/features" --towers="$retriever/features" --data-root="$root" \
        --dtype=float16 --phrases --splits train val test "model.name=$retriever"
    if [ "$tokens" -gt 256 ]; then
        rows=(--budgets 16 32 64 --sections untouched adapted budgets phrases cost)
        rows+=(--methods none samer querybank kmeans hpool sap-mean grid random)
    fi
    "$PYTHON" "${REPO}scripts/compare.py" --seeds "${seeds[@]}" --data-root="$root" --out="$here/compare" \
        --features="$here/features" --config="${REPO}configs/photos.yaml" "model.name=$retriever" \
        "merge.num_regions=$((tokens / 16))" ${rows[@]+"${rows[@]}"}
}

for size in "${sizes[@]}"; do evidence photographs "$data" "$size"; done
if [ -n "${CUTOUTS:-}" ] && [ -n "${BACKGROUNDS:-}" ]; then
    words "$CUTOUTS"; cutouts=("${WORDS[@]}")
    words "$BACKGROUNDS"
    "$PYTHON" "${REPO}scripts/collage.py" --out="$out/collages/scenes" --cutouts "${cutouts[@]}" \
        --backgrounds "${WORDS[@]}" --train 1600 --val 100 --test 400
    for size in "${sizes[@]}"; do evidence collages "$out/collages/scenes" "$size"; done
fi
echo "tables: $out/*/*/compare/results.md"
