#!/usr/bin/env bash
# Lint and tests; installs what they need. Arguments go to pytest, e.g. bash bash/test.sh tests/test_merging.py
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

prepare serve test
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest "$@"
