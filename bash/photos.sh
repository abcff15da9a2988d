#!/usr/bin/env bash
# The evidence on photographs, from two pretrained towers to the tables; every step goes on where it was stopped:
#   bash bash/photos.sh DATA_ROOT                              (towers from the hub)
#   bash bash/photos.sh DATA_ROOT --vision DIR --text DIR      (towers in folders)
# Arguments go to scripts/photos.py (--help lists them).
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh, dash, zsh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

prepare
exec "$PYTHON" "${REPO}scripts/photos.py" --out="${REPO}outputs/photos" "$@"
