#!/usr/bin/env bash
# The long form of the fault tests (tests/faults, tests/test_distributed.py), about an hour and a half on 2 cores: kills
# at random moments and at every change of a file, SIGTERM, full disks, spoiled files, dead ranks, and a soak; then one
# table. Variables (default):   SAMER_FAULT_CASES (8000 drawn cases of spoiled files)   SAMER_FAULT_MINUTES (30, the soak)
# SAMER_FAULT_LOG (outputs/faults.jsonl)                              Arguments go to pytest, e.g. -k SIGTERM
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

prepare requirements.txt requirements-serve.txt tests/requirements.txt
export SAMER_FAULT_LONG=1 SAMER_FAULT_CASES=${SAMER_FAULT_CASES:-8000} SAMER_FAULT_MINUTES=${SAMER_FAULT_MINUTES:-30}
export SAMER_FAULT_LOG=${SAMER_FAULT_LOG:-$PWD/outputs/faults.jsonl}
mkdir -p "$(dirname "$SAMER_FAULT_LOG")"
rm -f "$SAMER_FAULT_LOG"
status=0
"$PYTHON" -m pytest tests/faults tests/test_distributed.py "$@" || status=$?
"$PYTHON" tests/faults/table.py "$SAMER_FAULT_LOG" || status=$?
echo "the lines it is made of: $SAMER_FAULT_LOG"
exit "$status"
