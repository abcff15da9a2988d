#!/usr/bin/env bash
# Lint and tests, a worker for each core (8 at most) and a thread each; installs what they need. Arguments go to pytest,
# e.g. bash bash/test.sh tests/test_merging.py -n 0 (no workers: output as it comes, a debugger)
#   EXTRAS (none; "export sentence-transformers mteb ray": their tests are skipped where these are not installed)
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh, dash, zsh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

cd -- "${REPO:-.}"
REPO=
read -ra extras <<<"${EXTRAS:-}"
prepare serve test ${extras[@]+"${extras[@]}"}
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PYTHON" -m pytest -n auto --maxprocesses 8 --dist loadfile "$@"
