# Sourced by the launchers: from the repo root, with an interpreter that satisfies requirements.txt in $PYTHON.
# The active environment is used if it has everything; else .venv is made (or reused) and installed into.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# satisfied PYTHON FILE...: whether every requirement line of the files holds in that interpreter
satisfied() {
    "$1" - "${@:2}" <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version

try:
    from packaging.requirements import Requirement
except ImportError:
    try:
        from pip._vendor.packaging.requirements import Requirement
    except ImportError:
        sys.exit(1)
for path in sys.argv[1:]:
    for line in open(path, encoding="utf-8"):
        line = line.split("#")[0].strip()
        if not line or line.startswith("-"):
            continue
        need = Requirement(line)
        try:
            have = version(need.name).split("+")[0]
        except PackageNotFoundError:
            sys.exit(1)
        if not need.specifier.contains(have, prereleases=True):
            sys.exit(1)
PYTHON
}

# prepare FILE...: sets PYTHON to an interpreter that satisfies the requirement files, installing if needed
prepare() {
    local candidate
    for candidate in "$(command -v python || true)" "$(command -v python3 || true)" .venv/bin/python; do
        if [ -n "$candidate" ] && [ -x "$candidate" ] && satisfied "$candidate" "$@"; then
            PYTHON=$candidate
            return
        fi
    done
    local host
    host=$(command -v python3 || command -v python || true)
    [ -n "$host" ] || { echo "error: no python3 found; install Python 3.11 or newer" >&2; exit 2; }
    "$host" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "error: $("$host" --version) is too old; SaMer needs Python 3.11 or newer" >&2; exit 2; }
    echo "the active environment lacks requirements; installing into .venv (about 1.5 GB on disk, once)"
    [ -x .venv/bin/python ] || "$host" -m venv .venv
    # torch first and by itself: what comes after is satisfied by the pinned build
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
    local file
    for file in "$@"; do
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$file"
    done
    PYTHON=.venv/bin/python
}

# launch SCRIPT ARGUMENT...: one process, or torchrun with NPROC_PER_NODE of them; a launcher's last command. SIGTERM
# reaches the processes, which finish what is at work (torchrun gives them 30 seconds), and the status is 143.
launch() {
    [ "${NPROC_PER_NODE:-1}" -gt 1 ] || exec "$PYTHON" "$@"
    local torchrun="" stopped="" status=0
    stop() {
        stopped=$1
        [ -z "$torchrun" ] || kill -TERM "$torchrun" 2>/dev/null || true
    }
    trap 'stop 129' HUP
    trap 'stop 130' INT
    trap 'stop 143' TERM
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC_PER_NODE" "$@" &
    torchrun=$!
    [ -z "$stopped" ] || stop "$stopped"
    wait "$torchrun" || status=$?
    while kill -0 "$torchrun" 2>/dev/null; do # a signal ends bash's wait, not torchrun
        status=0
        wait "$torchrun" || status=$?
    done
    exit "${stopped:-$status}"
}
