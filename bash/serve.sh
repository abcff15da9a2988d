#!/usr/bin/env bash
# A page to search indexes by words. Variables (default):
#   CACHE_DIR (outputs/flickr_samer_k64; several with spaces between, or one a line)   PORT (8000)   DEVICE (auto)
#   DATA_ROOT (none; the data set's folder, where the pictures of an index made by bash/cache.sh lie)
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh, dash, zsh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

prepare serve
WORDS=("${REPO}outputs/flickr_samer_k64")
if [ -n "${CACHE_DIR:-}" ]; then folders "$CACHE_DIR"; fi
exec "$PYTHON" "${REPO}scripts/serve.py" --cache-dir "${WORDS[@]}" --port="${PORT:-8000}" --device="${DEVICE:-auto}" \
    ${DATA_ROOT:+--data-root="$DATA_ROOT"} "$@"
