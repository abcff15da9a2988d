# Sourced by the launchers. They stay in the folder they are called from, so relative paths in variables and arguments
# are read from there; $REPO stands before the repo's own files and before the default places of outputs: empty in the
# repo root, else the root with a slash. `prepare` puts into $PYTHON an interpreter that has what requirements.txt lists:
# that of the active environment if it has everything; else .venv is made in the repo (or reused) and installed into.
set -euo pipefail
unset CDPATH # cd would look elsewhere, and print
REPO=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)/
if [ "$REPO" -ef . ]; then REPO=; fi

TORCH=2.13.0 # what .venv gets; the package itself takes any torch>=2.9

# missing PYTHON EXTRA...: prints the requirements, of the base set and of those extras of pyproject.toml, that don't
# hold in that interpreter; fails where it can't tell
missing() {
    "$1" - "$REPO" "${@:2}" <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version

if sys.version_info < (3, 11):
    sys.exit(1)
import tomllib

try:
    from packaging.requirements import Requirement
except ImportError:
    try:
        from pip._vendor.packaging.requirements import Requirement
    except ImportError:
        sys.exit(1)
repo = sys.argv[1]
with open(repo + "requirements.txt", encoding="utf-8") as base:
    lines = [line for line in (line.split("#")[0].strip() for line in base) if line]
with open(repo + "pyproject.toml", "rb") as project:
    extras = tomllib.load(project)["project"]["optional-dependencies"]
for line in [*lines, *(line for extra in sys.argv[2:] for line in extras[extra])]:
    need = Requirement(line)
    if need.marker and not need.marker.evaluate():
        continue
    try:
        have = version(need.name).split("+")[0]
    except PackageNotFoundError:
        have = None
    if have is None or not need.specifier.contains(have, prereleases=True):
        print(line)
PYTHON
}

# satisfied PYTHON EXTRA...: whether nothing is missing
satisfied() {
    local lines
    lines=$(missing "$@") && [ -z "$lines" ]
}

has_nvidia() { command -v nvidia-smi >/dev/null || [ -e /proc/driver/nvidia ]; }

# install_torch: into .venv, first and by itself, so that what comes after is satisfied by this build. PyPI's build for
# Linux brings gigabytes of CUDA; the CPU build lies at PyTorch's own index, unless pip is told where to look.
install_torch() {
    local pip=("$REPO.venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==$TORCH")
    if ! has_nvidia && ! "$REPO.venv/bin/python" -m pip config list | grep -Ec 'index-url|find-links|constraint' >/dev/null; then
        "${pip[@]}" --index-url https://download.pytorch.org/whl/cpu && return
    fi
    "${pip[@]}"
}

unusable() {
    echo "error: .venv has no pip, or a Python older than 3.11; remove .venv and run this again" >&2
    exit 2
}

# prepare EXTRA...: sets PYTHON to an interpreter that has the base set and the extras, installing if needed
prepare() {
    local candidate
    for candidate in "$(command -v python || true)" "$(command -v python3 || true)" "$REPO.venv/bin/python"; do
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
    local size="1.7 GB on disk, with the CPU build of torch"
    if has_nvidia; then size="7 GB on disk, with the CUDA build of torch"; fi
    local extras
    extras=$(IFS=,; echo "$*")
    echo "the active environment lacks requirements; installing into $REPO.venv (about $size; a few minutes, once)"
    echo "(to install into the active environment instead, stop this and run: pip install -e '${REPO:-.}${extras:+[$extras]}')"
    [ -x "$REPO.venv/bin/python" ] || "$host" -m venv "$REPO.venv"
    local lines
    lines=$(missing "$REPO.venv/bin/python") || unusable
    if [[ $'\n'$lines == *$'\n'torch[\>=]* ]]; then install_torch; fi
    lines=$(missing "$REPO.venv/bin/python" "$@") || unusable
    if [ -n "$lines" ]; then
        "$REPO.venv/bin/python" -m pip install --quiet --disable-pip-version-check -r /dev/stdin <<<"$lines"
    fi
    PYTHON=$REPO.venv/bin/python
    echo "installed; later commands (python scripts/...) need it active:  source $REPO.venv/bin/activate"
}

# words TEXT: sets WORDS to the words of a variable that lists several, with white space between; no globs
words() {
    IFS=$' \t\n' read -r -d '' -a WORDS <<<"$1" || true
}

# folders TEXT: sets WORDS to the folders of a variable: one a line where it has several lines, all of it where it is the
# name of one folder, else its words; none begins as an option does
folders() {
    local line k
    WORDS=()
    if [[ $1 == *$'\n'* ]]; then
        while IFS= read -r line; do
            if [ -n "$line" ]; then WORDS+=("$line"); fi
        done <<<"$1"
    elif [ -e "$1" ]; then
        WORDS=("$1")
    else
        words "$1"
    fi
    for k in "${!WORDS[@]}"; do
        case ${WORDS[k]} in -*) WORDS[k]=./${WORDS[k]} ;; esac
    done
}

# number NAME VALUE: refuses what is no whole number
number() {
    case $2 in
        '' | *[!0-9]*) echo "error: $1 is '$2'; give the number of $3" >&2; exit 2 ;;
    esac
}

# first_host LIST: the first name of a SLURM node list, such as gpu[003-007,9],cpu1
first_host() {
    local head=${1%%[[,]*} rest=${1#*[} tail=""
    case $1 in
        "$head"\[*)
            tail=${rest#*]}
            echo "$head${rest%%[],-]*}${tail%%,*}"
            ;;
        *) echo "$head" ;;
    esac
}

# nodes: sets RENDEZVOUS to what torchrun needs to join NNODES machines, each of which runs the same launcher. What is
# not set by hand is SLURM's, in a step with one task a node (srun --ntasks-per-node=1 bash bash/cache.sh).
nodes() {
    RENDEZVOUS=(--standalone)
    if [ -z "${NNODES:-}" ] && [ "${SLURM_STEP_NUM_NODES:-1}" != 1 ]; then
        NNODES=$SLURM_STEP_NUM_NODES
        if [ "${SLURM_STEP_NUM_TASKS:-$NNODES}" != "$NNODES" ]; then
            echo "error: SLURM starts $SLURM_STEP_NUM_TASKS tasks on $NNODES nodes; start one a node (srun --ntasks-per-node=1), NPROC_PER_NODE says how many processes each has" >&2
            exit 2
        fi
        NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}
        MASTER_ADDR=${MASTER_ADDR:-$(first_host "${SLURM_STEP_NODELIST:-}")}
        MASTER_PORT=${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 10000))}
    fi
    number NNODES "${NNODES:=1}" machines
    [ "$NNODES" -gt 1 ] || return 0
    RENDEZVOUS=(--nnodes "$NNODES")
    if [ -n "${RDZV_ENDPOINT:-}" ]; then # any machine may come first; they number themselves
        RENDEZVOUS+=(--rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-${SLURM_JOB_ID:-samer}}")
        return
    fi
    number NODE_RANK "${NODE_RANK:-}" "this machine, 0 to NNODES - 1"
    [ "$NODE_RANK" -lt "$NNODES" ] ||
        { echo "error: NODE_RANK is $NODE_RANK of NNODES=$NNODES; machines count from 0" >&2; exit 2; }
    [ -n "${MASTER_ADDR:-}" ] ||
        { echo "error: NNODES is $NNODES, and MASTER_ADDR is not set; give the address of machine 0, or RDZV_ENDPOINT=HOST:PORT" >&2; exit 2; }
    RENDEZVOUS+=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
}

# part: sets PART_FLAG to --part=K/N of PART, or of a SLURM job array, whose tasks each make an index of their own; and
# CACHE_DIR to that index's folder, within the folder that it names
part() {
    PART_FLAG=()
    if [ -z "${PART:-}" ] && [ "${SLURM_ARRAY_TASK_COUNT:-1}" != 1 ]; then
        PART=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN + 1))/$SLURM_ARRAY_TASK_COUNT
        [ "$((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN + 1))" = "$SLURM_ARRAY_TASK_COUNT" ] ||
            { echo "error: the array's tasks are not numbered one by one (--array=0-99); set PART=K/N" >&2; exit 2; }
    fi
    [ -n "${PART:-}" ] || return 0
    PART_FLAG=(--part="$PART")
    CACHE_DIR=$CACHE_DIR/part-$(printf %05d "${PART%%/*}")
}

# launch SCRIPT ARGUMENT...: one process, or torchrun with NPROC_PER_NODE of them on each of NNODES machines; a
# launcher's last command. SIGTERM reaches the processes, which finish what is at work (torchrun gives them 30 seconds),
# and the status is 143.
launch() {
    number NPROC_PER_NODE "${NPROC_PER_NODE:=1}" processes
    nodes
    [ "$NPROC_PER_NODE" -gt 1 ] || [ "$NNODES" -gt 1 ] || exec "$PYTHON" "$@"
    local torchrun="" stopped="" status=0
    stop() {
        stopped=$1
        [ -z "$torchrun" ] || kill -TERM "$torchrun" 2>/dev/null || true
    }
    trap 'stop 129' HUP
    trap 'stop 130' INT
    trap 'stop 143' TERM
    "$PYTHON" -m torch.distributed.run "${RENDEZVOUS[@]}" --nproc-per-node "$NPROC_PER_NODE" "$@" &
    torchrun=$!
    [ -z "$stopped" ] || stop "$stopped"
    wait "$torchrun" || status=$?
    while kill -0 "$torchrun" 2>/dev/null; do # a signal ends bash's wait, not torchrun
        status=0
        wait "$torchrun" || status=$?
    done
    exit "${stopped:-$status}"
}
