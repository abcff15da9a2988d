"""The launchers in bash/: what they hand to the scripts, from any folder, shell and repo, with any name in a variable.

`python` is a stub that has everything and writes its arguments down.
"""

import os
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAUNCHERS = sorted(path.stem for path in ROOT.glob("bash/*.sh") if path.stem not in ("env", "faults", "test"))
STUB = """#!/bin/sh
if [ "$1" = - ]; then cat >/dev/null; exit 0; fi
pwd -P >>"$SAID"
for word; do printf '%s\\0' "$word" >>"$SAID.words"; done
printf '\\n\\0' >>"$SAID.words"
"""
NAMED = ("DATA_ROOT", "CACHE_DIR", "FEATURES_DIR", "OUTPUT_DIR", "OUTPUT_JSON", "CONFIG", "ADAPTER_PATH")
NODES = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RDZV_ENDPOINT", "RDZV_ID")


@pytest.fixture
def place(tmp_path):
    """A copy of the launchers in a repo whose path holds spaces, a folder to call from, and the stub."""
    for folder in ("bin", "the repo/bash", "caller", "caller/repo/bash"):
        (tmp_path / folder).mkdir(parents=True)
    for path in ROOT.glob("bash/*.sh"):
        shutil.copy(path, tmp_path / "the repo" / "bash")
    (tmp_path / "bin" / "python").write_text(STUB)
    (tmp_path / "bin" / "python").chmod(0o755)
    return tmp_path


def called(place, launcher, *words, cwd="caller", shell="bash", path=None, **variables):
    """Status, errors, and per call of `python` the folder it ran in and its arguments."""
    said = place / "said"
    for old in place.glob("said*"):
        old.unlink()
    unset = (*NAMED, *NODES, "CDPATH", "NPROC_PER_NODE", "SPLITS", "SEEDS", "PART")
    kept = {k: v for k, v in os.environ.items() if k not in unset and not k.startswith("SLURM_")}
    env = {**kept, "PATH": f"{place / 'bin'}:/usr/bin:/bin", "SAID": str(said), **variables}
    line = [shell, str(path or place / "the repo" / "bash" / f"{launcher}.sh"), *words]
    done = subprocess.run(line, cwd=place / cwd, env=env, capture_output=True, text=True, timeout=60, check=False)
    folders = said.read_text().splitlines() if said.exists() else []
    text = (place / "said.words").read_text() if folders else ""
    calls = [part.split("\0")[:-1] for part in text.split("\n\0") if part]
    return done.returncode, done.stderr, list(zip(folders, calls))


def option(words, name):
    """The values after an option, or the one within it."""
    for k, word in enumerate(words):
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
        if word == name:
            rest = words[k + 1 :]
            return rest[: next((j for j, other in enumerate(rest) if other.startswith("--")), len(rest))]
    return None


ODD = ["data", "../up", "with space/a  b", "-dash", "*", "$HOME", "a'b\"c", "[x]", "tab\there", "ünicode", "/abs/olute"]


@pytest.mark.parametrize("name", ODD)
def test_names_arrive_as_they_are_and_stand_where_the_caller_does(place, name):
    values = {variable: f"{name}{number}" for number, variable in enumerate(NAMED)}
    expected = {
        "cache": {"--data-root": 0, "--cache-dir": 1, "--features": 2, "--adapter-path": 6},
        "features": {"--data-root": 0, "--out": 2},
        "compare": {"--data-root": 0, "--out": 3, "--features": 2, "--config": 5},
        "inference": {"--data-root": 0, "--cache-dir": 1, "--features": 2, "--output-json": 4},
        "train": {"--config": 5},
        "mteb": {"--data-root": 0, "--cache-dir": 1, "--adapter-path": 6},
    }
    for launcher, options in expected.items():
        status, said, ((folder, words),) = called(place, launcher, "--flag", "", "a b", "*", **values)
        assert (status, said) == (0, "")
        assert folder == str(place / "caller")
        assert {each: option(words, each) for each in options} == {each: f"{name}{k}" for each, k in options.items()}
        assert words[-4:] == ["--flag", "", "a b", "*"]
        if launcher == "train":
            assert {f"data.root={name}0", f"data.features={name}2", f"train.output_dir={name}3"} <= set(words)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_what_is_not_named_lies_in_the_repo(place, launcher):
    repo = f"{place / 'the repo'}/"
    for cwd, before in (("caller", repo), ("the repo", ""), ("the repo/bash", repo)):
        _, said, calls = called(place, launcher, cwd=cwd, DATA_ROOT="d", IMAGES="i")
        assert said == ""
        (folder, words) = calls[-1]
        assert folder == str(place / cwd)
        assert words[0].startswith(f"{before}scripts/")
        own = [word.partition("=")[2] or word for word in words[1:]]
        own = [word for word in own if word.startswith(("outputs/", "checkpoints/", "configs/", "features/", repo))]
        assert own
        assert all(word.startswith(before) for word in own)


def test_the_built_in_world_is_compared_from_anywhere(place):
    status, _, calls = called(place, "compare", "train.seed=1")
    assert status == 0
    repo = f"{place / 'the repo'}/"
    (scenes, compare) = (words for _, words in calls)
    assert scenes[:2] == [f"{repo}scripts/scenes.py", f"--out={repo}outputs/compare/world"]
    assert option(compare, "--data-root") == f"{repo}outputs/compare/world"
    assert compare[-2:] == [f"model.name={repo}assets/retriever", "train.seed=1"]
    assert option(compare, "--seeds") == ["0", "1", "2"]  # an override is not taken for a seed
    _, _, calls = called(place, "compare", cwd="the repo")
    assert not [word for word in calls[-1][1] if word.startswith("model.name")]


def test_an_override_after_the_seeds_is_one(place, script):
    """What the launcher hands over is read so by the script."""
    _, _, ((_, words),) = called(
        place, "compare", "train.seed=1", DATA_ROOT="d", CONFIG=str(ROOT / "configs/demo.yaml")
    )
    taken = []
    check = mock.patch("samer.compare.plan.check_request", lambda sections, seeds, *_: taken.append(seeds) or 1 / 0)
    with check, pytest.raises(ZeroDivisionError):
        script("compare").main(words[1:])
    assert taken == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("value", "folders"),
    [
        ("one", ["one"]),
        ("one two\tthree", ["one", "two", "three"]),
        ("a b", ["a b"]),  # a folder of that name is there
        ("x y\nz", ["x y", "z"]),
        ("a b\n", ["a b"]),
        ("-x *", ["./-x", "*"]),
    ],
)
def test_several_folders_of_indexes(place, value, folders):
    """None may be taken apart by its spaces where it exists, and the default never, wherever the repo lies."""
    (place / "caller" / "a b").mkdir()
    (place / "caller" / "file").touch()
    status, said, ((_, words),) = called(place, "serve", CACHE_DIR=value, PORT="1")
    assert (status, said) == (0, "")
    assert option(words, "--cache-dir") == folders


@pytest.mark.parametrize(
    ("launcher", "variable", "flag"), [("cache", "SPLITS", "--splits"), ("compare", "SEEDS", "--seeds")]
)
def test_lists_are_words_and_no_patterns(place, launcher, variable, flag):
    (place / "caller" / "file").touch()
    _, _, ((_, words),) = called(place, launcher, DATA_ROOT="d", **{variable: " one *\n two "})
    assert option(words, flag) == ["one", "*", "two"]


def test_folders_that_cd_looks_in_are_not_looked_in(place):
    """With CDPATH, `cd bash/..` went to another repo, and printed it."""
    variables = {"CDPATH": f"{place / 'caller' / 'repo'}:.", "DATA_ROOT": "d"}
    status, said, ((folder, words),) = called(place, "cache", cwd="the repo", path="bash/cache.sh", **variables)
    assert (status, said, folder, words[0]) == (0, "", str(place / "the repo"), "scripts/cache.py")


def test_a_repo_behind_a_link(place):
    (place / "link").symlink_to(place / "the repo")
    status, said, ((folder, words),) = called(place, "cache", path="../link/bash/cache.sh", DATA_ROOT="d")
    assert (status, said, folder) == (0, "", str(place / "caller"))
    assert words[0] == f"{place / 'link'}/scripts/cache.py"
    _, _, ((_, words),) = called(place, "cache", cwd="link", path="bash/cache.sh", DATA_ROOT="d")
    assert words[0] == "scripts/cache.py"


@pytest.mark.parametrize("shell", ["sh", "dash", "zsh"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_another_shell_hands_over_to_bash(place, shell, launcher):
    if not shutil.which(shell):
        pytest.skip(f"no {shell} here")
    status, said, calls = called(place, launcher, "a b", shell=shell, DATA_ROOT="d", IMAGES="i")
    assert (status, said) == (0, "")
    assert calls[-1][1][-1] == "a b"


@pytest.mark.parametrize("value", ["gpu", "-1", "2.5", "2 3"])
def test_a_number_of_processes_that_is_none(place, value):
    status, said, calls = called(place, "train", DATA_ROOT="d", NPROC_PER_NODE=value)
    assert (status, said, calls) == (2, f"error: NPROC_PER_NODE is '{value}'; give the number of processes\n", [])


def test_several_processes_are_torchruns(place):
    _, _, ((_, words),) = called(place, "train", DATA_ROOT="d", NPROC_PER_NODE="2")
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert words[:6] == [*start, f"{place / 'the repo'}/scripts/train.py"]


BY_HAND = {"NNODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "10.0.0.7"}
STEP = {
    "SLURM_JOB_ID": "1230042",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NODELIST": "gpu[007-008,011]",
    "SLURM_NODEID": "1",
}


@pytest.mark.parametrize(
    ("variables", "flags"),
    [
        (BY_HAND, "--nnodes 3 --node-rank 2 --master-addr 10.0.0.7 --master-port 29500"),
        ({**BY_HAND, "MASTER_PORT": "7"}, "--nnodes 3 --node-rank 2 --master-addr 10.0.0.7 --master-port 7"),
        (
            {"NNODES": "2", "RDZV_ENDPOINT": "a:1", "RDZV_ID": "x"},
            "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint a:1 --rdzv-id x",
        ),
        (STEP, "--nnodes 3 --node-rank 1 --master-addr gpu007 --master-port 20042"),
        (
            {**STEP, "SLURM_STEP_NODELIST": "b4,gpu[1-2]"},
            "--nnodes 3 --node-rank 1 --master-addr b4 --master-port 20042",
        ),
        ({**STEP, "NNODES": "1", "NPROC_PER_NODE": "4"}, "--standalone"),  # what is said by hand counts
        ({"SLURM_NNODES": "3", "NPROC_PER_NODE": "4"}, "--standalone"),  # a batch script, which runs on one node only
    ],
)
def test_several_machines(place, variables, flags):
    status, said, ((_, words),) = called(place, "features", DATA_ROOT="d", **variables)
    assert (status, said) == (0, "")
    count = variables.get("NPROC_PER_NODE", "1")
    start = ["-m", "torch.distributed.run", *flags.split(), "--nproc-per-node", count]
    assert words[: len(start)] == start
    assert words[len(start)].endswith("scripts/features.py")


def test_a_step_of_one_node_is_one_process(place):
    _, _, ((_, words),) = called(place, "cache", DATA_ROOT="d", SLURM_STEP_NUM_NODES="1", SLURM_NODEID="0")
    assert words[0].endswith("scripts/cache.py")


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"NNODES": "two"}, "NNODES is 'two'; give the number of machines"),
        ({"NNODES": "2"}, "NODE_RANK is ''; give the number of this machine, 0 to NNODES - 1"),
        ({**BY_HAND, "NODE_RANK": "3"}, "NODE_RANK is 3 of NNODES=3; machines count from 0"),
        ({**BY_HAND, "MASTER_ADDR": ""}, "NNODES is 3, and MASTER_ADDR is not set; give the address of machine 0, or"),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "12"}, "SLURM starts 12 tasks on 3 nodes; start one a node"),
    ],
)
def test_machines_that_can_not_meet(place, variables, said):
    status, told, calls = called(place, "cache", DATA_ROOT="d", **variables)
    assert (status, calls) == (2, [])
    assert told.startswith(f"error: {said}")
    assert told.count("\n") == 1


ARRAY = {"SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "8"}


@pytest.mark.parametrize(
    ("variables", "part"),
    [({"PART": "3/8"}, 3), ({**ARRAY, "SLURM_ARRAY_TASK_ID": "8"}, 8), ({**ARRAY, "SLURM_ARRAY_TASK_ID": "1"}, 1)],
)
@pytest.mark.parametrize("launcher", ["cache", "index"])
def test_a_job_of_an_array_makes_an_index_of_its_own(place, launcher, variables, part):
    named = {"DATA_ROOT": "d", "IMAGES": "d", "CACHE_DIR": "the index"}
    status, said, ((_, words),) = called(place, launcher, **named, **variables)
    assert (status, said) == (0, "")
    assert (option(words, "--part"), option(words, "--cache-dir")) == (f"{part}/8", f"the index/part-0000{part}")
    _, _, ((_, words),) = called(place, launcher, **named)
    assert (option(words, "--part"), option(words, "--cache-dir")) == (None, "the index")


def test_an_array_with_gaps_is_refused(place):
    variables = {**ARRAY, "SLURM_ARRAY_TASK_MAX": "15", "SLURM_ARRAY_TASK_ID": "3"}
    status, said, calls = called(place, "cache", DATA_ROOT="d", **variables)
    assert (status, calls) == (2, [])
    assert said == "error: the array's tasks are not numbered one by one (--array=0-99); set PART=K/N\n"


def test_tests_run_in_the_repo(place):
    status, said, calls = called(place, "test", "tests/test_merging.py")
    assert (status, said) == (0, "")
    assert {folder for folder, _ in calls} == {str(place / "the repo")}
    *words, last = calls[-1][1]
    assert words[:4] == ["-m", "pytest", "-n", "auto"]  # a worker for each core
    assert last == "tests/test_merging.py"


def test_pictures_that_are_not_named_are_asked_for(place):
    status, said, calls = called(place, "index")
    assert (status, calls) == (2, [])
    assert said.startswith("error: IMAGES is not set; ")


@pytest.mark.parametrize("launcher", ["cache", "features", "train"])
def test_a_data_set_that_is_not_named_is_asked_for(place, launcher):
    status, said, calls = called(place, launcher)
    assert (status, calls) == (2, [])
    assert said.startswith("error: DATA_ROOT is not set; ")
    assert said.count("\n") == 1


def test_the_launchers_use_no_syntax_newer_than_bash_3():
    newer = ("mapfile", "readarray", "declare -A", "local -n", "${!@}", ",,}", "^^}", "|&", "&>>", "coproc")
    for path in ROOT.glob("bash/*.sh"):
        text = path.read_text(encoding="utf-8")
        assert not [word for word in newer if word in text], path.name
