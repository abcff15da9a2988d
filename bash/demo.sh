#!/usr/bin/env bash
# The whole job on generated scenes, on a CPU: scenes, training, caches, evaluation, one table. Nothing to download but
# Python packages, if the active environment lacks them. Arguments go to scripts/demo.py (--help lists them).
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh, dash, zsh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

prepare
exec "$PYTHON" "${REPO}scripts/demo.py" --out="${REPO}outputs/demo" "$@"
