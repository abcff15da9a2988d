#!/usr/bin/env bash
# Lint and tests; installs what they need. Arguments go to pytest, e.g. bash bash/test.sh tests/test_merging.py
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh, dash, zsh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

cd -- "${REPO:-.}"
REPO=
prepare serve test
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest "$@"
