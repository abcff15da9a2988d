"""Files, locks and processes: permissions, one writer, work of one process, and why a job of several ends."""

import ast
import errno
import os
import re
import signal
import stat
import subprocess
import sys
import types
from pathlib import Path

import filelock
import pytest
import torch
import torch.distributed as dist

from samer.config import InputError
from samer.runtime import commands, files, processes, signals

ROOT = Path(__file__).resolve().parents[1]


# --- files ----------------------------------------------------------------------------------------------------------

WRITE = """
import os, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from samer.runtime.files import atomic_path, only_writer, write_json

os.umask(int(sys.argv[2], 8))
folder = Path(sys.argv[1]) / "deep" / "index"
with only_writer(folder):
    write_json(folder / "inner" / "manifest.json", {})
    with atomic_path(folder / "shard.safetensors") as temporary:
        save_file({"a": torch.zeros(2)}, temporary)
    with open(folder / "lock-mode", "w") as file:
        file.write(oct(os.stat(folder / ".lock").st_mode & 0o777))
"""


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_new_files_and_folders_obey_the_umask(tmp_path, command, umask):
    done = command(sys.executable, "-c", WRITE, tmp_path, oct(umask)[2:], env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    for name in ("manifest.json", "shard.safetensors", "lock-mode"):
        assert modes[name] == 0o666 & ~umask
    for name in ("deep", "index", "inner"):
        assert modes[name] == 0o777 & ~umask
    (mode,) = (path.read_text() for path in tmp_path.rglob("lock-mode"))
    assert int(mode, 8) == 0o666 & ~umask


def test_a_file_replaced_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail():
        with files.atomic_path(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("a.json", "old")]


def test_a_failed_writer_leaves_no_empty_folders_and_no_lock(tmp_path):
    def fail():
        with files.only_writer(tmp_path / "a" / "b"):
            (tmp_path / "a" / "b" / "val").mkdir()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_strays_of_a_killed_writer_go_but_not_those_of_a_writer_within(tmp_path):
    mine, inner, held = (tmp_path / name for name in (".a.1.samer-tmp", "val/.a.1.samer-tmp", "other/.a.1.samer-tmp"))
    for stray in (mine, inner, held):
        stray.parent.mkdir(exist_ok=True)
        stray.touch()
    with files.only_writer(held.parent):
        held.touch()
        with files.only_writer(tmp_path):
            assert [stray.exists() for stray in (mine, inner, held)] == [False, False, True]


def test_a_folder_that_is_no_folder_or_may_not_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with (
            pytest.raises(InputError, match=r"can't be written \(.*\); .*name another place"),
            files.only_writer(place),
        ):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_and_written_to(tmp_path, monkeypatch, capsys, number):
    import fcntl

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with files.only_writer(tmp_path / "c"):
        (tmp_path / "c" / "file").touch()
    assert re.match(r"note: .*/c can't be locked \(.*\); let nothing else write to it\n$", capsys.readouterr().out)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["file"]


def test_a_stop_while_the_lock_is_taken_leaves_nothing(tmp_path, monkeypatch):
    acquire = filelock.FileLock.acquire

    def stopped(self, *words, **more):
        taken = acquire(self, *words, **more)
        os.kill(os.getpid(), signal.SIGTERM)  # its file is there, its owner does not know yet
        return taken

    monkeypatch.setattr(filelock.FileLock, "acquire", stopped)
    with pytest.raises(signals.Stopped), signals.listening(), files.only_writer(tmp_path / "a" / "b"):
        pass
    assert list(tmp_path.iterdir()) == []


RACE = """
import sys
from pathlib import Path
from samer.config import InputError
from samer.runtime.files import only_writer

count, refused, mark = 0, 0, Path(sys.argv[1]).parent / "mark"
while count < 60:
    try:
        with only_writer(sys.argv[1]):
            mark.open("x").close()  # fails where another writer is within
            mark.unlink()
            count += 1
    except InputError:
        refused += 1
"""


def test_writers_that_come_and_go_never_meet(tmp_path):
    """The lock's file goes with the lock: one that has opened it before must not take it for the folder's."""
    words = [sys.executable, "-c", RACE, str(tmp_path / "c")]
    settings = {"stderr": subprocess.PIPE, "text": True, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    writers = [subprocess.Popen(words, **settings) for _ in range(3)]
    said = [writer.communicate(timeout=120)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0], said


# --- the work of one process ----------------------------------------------------------------------------------------


def test_a_command_that_shares_no_work_refuses_several_processes(monkeypatch, capsys):
    called = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stopped:
        commands.run(lambda: called.append(1))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: this command runs in one process, and WORLD_SIZE is 2")
    assert "only train, align, features, cache, compare and SEPS" in line
    commands.run(lambda: called.append(2), shared=True)
    monkeypatch.setenv("WORLD_SIZE", "1")
    commands.run(lambda: called.append(3))
    assert called == [2, 3]


SHARED = ("train", "align", "features", "cache", "compare", "seps_train", "seps_eval")


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "scripts").glob("[a-z]*.py")))
def test_only_these_share_their_work(name):
    tree = ast.parse((ROOT / "scripts" / f"{name}.py").read_text())
    calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    runs = [call for call in calls if call.startswith("run(main")]
    assert runs == ["run(main, shared=True)" if name in SHARED else "run(main)"]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_started_by_torchrun_makes_no_index(tmp_path, command, rank):
    words = [sys.executable, "scripts/index.py", tmp_path, "--out", tmp_path / "c"]
    done = command(*words, env={"WORLD_SIZE": "2", "RANK": rank})
    assert done.returncode == 2
    assert "WORLD_SIZE is 2" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", ["0", "1"])
def test_no_process_of_several_writes_before_they_have_joined(tmp_path, monkeypatch, rank):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(InputError, match=r"c: WORLD_SIZE is 2, .*process_group"), files.only_writer(tmp_path / "c"):
        pass
    assert list(tmp_path.iterdir()) == []


# --- a job of several processes -------------------------------------------------------------------------------------


@pytest.fixture
def joined(monkeypatch):
    """Two processes by the environment, whose joining is only claimed; returns what `init_process_group` was given."""
    given, state = [], types.SimpleNamespace(on=False)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    def begin(backend):
        given.append(backend)
        state.on = True

    monkeypatch.setattr(dist, "init_process_group", begin)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: setattr(state, "on", False))
    monkeypatch.setattr(dist, "is_initialized", lambda: state.on)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return given


def raised(error):
    with pytest.raises(Exception) as caught, processes.process_group():  # noqa: PT011
        raise error
    return caught.value


LEFT = [
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:24871",
    "[enforce fail at pair.cc:534] . Read error [127.0.0.1]:5: Connection reset by peer",
    "[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete",
    "writev [127.0.0.1]:5: Broken pipe",
    "NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error, NCCL version 2.27.5\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    "Socket Timeout: connection was closed by remote peer",
    "failed to recv, got 0 bytes",
]


@pytest.mark.parametrize("words", LEFT)
def test_a_peer_that_left_is_named_as_such(joined, words):
    error = raised(RuntimeError(words))
    assert isinstance(error, InputError)
    assert str(error).startswith("process 1 of 2: another process of this job has ended, its own message says why")
    assert str(error).endswith("run the same command again to go on")
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    "words",
    [
        "mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)",
        "NCCL is not what this is about: a defect",
        "gloo knows no bfloat16",
        "DataLoader worker (pid 7) exited unexpectedly",
        "CUDA error: device-side assert triggered",
    ],
)
def test_a_defect_keeps_its_own_words(joined, words):
    defect = RuntimeError(words)
    assert raised(defect) is defect


# https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting.html; NCCL's guesses name a peer here, too
NCCL = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, {kind}, NCCL version 2.27.5
{guess}
Last error:
{cause}
Exception raised from getNCCLComm (most recent call first):
frame #0: c10::Error::Error(c10::SourceLocation) + 0x96"""
SYSTEM = (
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. It can be "
    "also caused by unexpected exit of a remote peer, you can check NCCL warnings for failure reason and see if there "
    "is connection closure by a peer."
)


@pytest.mark.parametrize(
    ("kind", "guess", "cause"),
    [
        (
            "invalid usage (run with NCCL_DEBUG=WARN for details)",
            "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.",
            "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000",
        ),
        (
            "unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
            "ncclUnhandledCudaError: Call to CUDA function failed.",
            "Cuda failure 35 'CUDA driver version is insufficient for CUDA runtime version'",
        ),
        ("unhandled system error", SYSTEM, "Error while creating shared memory segment (No space left on device)"),
    ],
)
def test_what_nccl_found_wrong_is_told(joined, kind, guess, cause):
    error = raised(dist.DistBackendError(NCCL.format(kind=kind, guess=guess, cause=cause)))
    assert isinstance(error, InputError)
    assert cause in str(error)
    assert "has ended" not in str(error)
    assert "frame #0" not in str(error)
    assert "\n" not in str(error)


def test_a_port_that_is_taken_is_told(joined, monkeypatch):
    def taken(backend):
        raise dist.DistNetworkError("The server socket has failed to listen on any local network address. port: 29500")

    monkeypatch.setattr(dist, "init_process_group", taken)
    rule = r"process 1 of 2: the processes can't work together: .*port: 29500"
    with pytest.raises(InputError, match=rule), processes.process_group():
        pass


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "WORLD_SIZE"])
def test_more_processes_than_gpus_are_refused_before_they_join(joined, monkeypatch, name):
    chosen = []
    monkeypatch.setenv(name, "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with pytest.raises(InputError, match=r"4 processes on this machine .* 3 GPUs"), processes.process_group():
        pass
    assert joined == chosen == []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with processes.process_group():
        pass
    assert (joined, chosen) == (["nccl"], [1])


def test_one_process_joins_nothing_and_changes_no_error():
    defect = RuntimeError("Connection closed by peer")
    assert raised(defect) is defect


def test_a_folder_that_can_not_be_made_is_no_other_writers(tmp_path):
    """/proc makes no folders and says that there is no such file; nobody is to be waited for."""
    with (
        pytest.raises(InputError, match=r"can't be written \(No such file or directory\)"),
        files.only_writer("/proc/x"),
    ):
        pass
