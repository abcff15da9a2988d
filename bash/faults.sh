#!/usr/bin/env bash
# The long form of the fault tests (tests/faults, tests/test_distributed.py), about three quarters of an hour on 2 cores:
# kills at random moments and at every change of a file, SIGTERM, full disks, spoiled files, dead processes, and beside
# them a soak; then one table. Arguments go to pytest, e.g. -k SIGTERM. Variables (default):
#   SAMER_FAULT_CASES (8000 drawn cases of spoiled files, beside fixed ones)   SAMER_FAULT_MINUTES (30, the soak)
#   SAMER_FAULT_LOG (outputs/faults.jsonl: what the table is made of)
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh, dash, zsh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

case ${SAMER_FAULT_LOG:=${REPO:-$PWD/}outputs/faults.jsonl} in /*) ;; *) SAMER_FAULT_LOG=$PWD/$SAMER_FAULT_LOG ;; esac
export SAMER_FAULT_LOG
cd -- "${REPO:-.}"
REPO=
prepare serve test
export SAMER_FAULT_LONG=1 SAMER_FAULT_CASES=${SAMER_FAULT_CASES:-8000} SAMER_FAULT_MINUTES=${SAMER_FAULT_MINUTES:-30}
mkdir -p "$(dirname -- "$SAMER_FAULT_LOG")"
rm -f "$SAMER_FAULT_LOG"
echo "soak of $SAMER_FAULT_MINUTES minutes and the other faults; lines go to $SAMER_FAULT_LOG"
OMP_NUM_THREADS=1 "$PYTHON" -m pytest tests/faults/test_soak.py >"$SAMER_FAULT_LOG.soak.txt" 2>&1 &
soak=$!
trap 'kill "$soak" 2>/dev/null || true' EXIT
status=0
"$PYTHON" -m pytest tests/faults tests/test_distributed.py --ignore tests/faults/test_soak.py "$@" || status=$?
wait "$soak" || { status=$?; cat "$SAMER_FAULT_LOG.soak.txt"; }
"$PYTHON" tests/faults/table.py "$SAMER_FAULT_LOG"
exit "$status"
