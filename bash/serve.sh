#!/usr/bin/env bash
# A page to search indexes by words. Variables (default):
#   CACHE_DIR (outputs/flickr_samer_k64; several with spaces between)   PORT (8000)   DEVICE (auto)
#   DATA_ROOT (none; Flickr30k-Entities, where the pictures of such an index lie)
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

prepare serve
read -ra FOLDERS <<<"${CACHE_DIR:-outputs/flickr_samer_k64}"
exec "$PYTHON" scripts/serve.py --cache-dir "${FOLDERS[@]}" --port "${PORT:-8000}" --device "${DEVICE:-auto}" \
    ${DATA_ROOT:+--data-root "$DATA_ROOT"} "$@"
