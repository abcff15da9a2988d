"""Commands as a shell runs them: how soon they start, pipes, closed and full streams, Ctrl-C, terminals, names."""

import codecs
import gc
import io
import json
import os
import pty
import random
import select
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from samer.config import InputError
from samer.runtime import commands, progress, streams
from samer.search import answers, queries
from samer.search.open_index import Found

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in ROOT.glob("scripts/*.py") if path.name != "__init__.py")
MINUTE = 60  # a hang, on any machine
INTERRUPTED = "interrupted; run the same command again to go on\n"
PLAIN = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
RUN = "import sys, time\nfrom samer.runtime.commands import run\ndef main():\n    {}\nrun(main)"


def child(line, *, shell="{}", **settings):
    """`main` of one line in a process of its own, which {} stands for in a line of bash; status, output, errors."""
    code = RUN.format(line.replace("\n", "\n    "))
    command = shell.format('"$PYTHON" -c "$CODE"')
    env = {**PLAIN, **settings.pop("env", {}), "PYTHON": sys.executable, "CODE": code}
    done = subprocess.run(
        ["bash", "-c", command], env=env, capture_output=True, timeout=MINUTE, check=False, **settings
    )
    return done.returncode, done.stdout.decode(errors="backslashreplace"), done.stderr.decode()


@pytest.fixture(scope="module")
def index(world, base, script, tmp_path_factory):
    """An index of 8 scenes; the folder."""
    folder = tmp_path_factory.mktemp("shell") / "c"
    words = ["--images", world / "images", "--cache-dir", folder, f"model.name={base}", "merge.num_regions=4"]
    script("index").main([*map(str, words)])
    return folder


@pytest.fixture(scope="module")
def opened(index):
    from samer.search.models import Models
    from samer.search.open_index import SearchIndex

    return SearchIndex(index, Models("cpu"))


# --- quick to start -------------------------------------------------------------------------------------------------

LIGHT = """
import contextlib, importlib, io, json, sys
sys.path.insert(0, sys.argv[1])
module = importlib.import_module("scripts." + sys.argv[2])
with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()):
    for words in (["--help"], ["--no-such-option"]):
        try:
            module.main(words)
        except SystemExit as end:
            print("status", end.code)
heavy = ["torch", "numpy", "transformers", "PIL", "scipy", "matplotlib", "filelock", "tqdm", "safetensors"]
print(json.dumps([said.getvalue().split()[0], [name for name in heavy if name in sys.modules]]), file=sys.__stdout__)
"""


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_and_usage_errors_import_nothing_heavy(command, name):
    done = command(sys.executable, "-c", LIGHT, ROOT, name)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == ["usage:", []]


def test_public_names_are_imported_when_they_are_asked_for(command):
    lines = """
import sys
import samer.config
assert "torch" not in sys.modules and "typing" not in vars(samer)
assert set(samer.__all__) <= set(dir(samer))
from samer import InputError, MergeConfig
assert "torch" not in sys.modules
from samer import *
assert sorted(name for name in samer.__all__ if name in globals()) == samer.__all__
assert samer.maxsim is samer.scoring.maxsim and samer.merging.merge_tokens is merge_tokens
assert samer.VisualTokens.__module__ == "samer.tokens"
assert not hasattr(samer, "merge_token") and not hasattr(samer, "__wrapped__")
"""
    done = command(sys.executable, "-c", lines, env={"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", [None, "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_threads_sleep_unless_the_user_says_how_they_wait(monkeypatch, name):
    for each in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(each, raising=False)
    if name:
        monkeypatch.setenv(name, "7")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    commands.wait_quietly()
    found = {
        each: os.environ[each] for each in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME") if each in os.environ
    }
    assert found == ({name: "7"} if name else dict(commands.WAITING))


@pytest.mark.parametrize("name", ["search", "serve"])
def test_search_and_serve_set_it_before_torch_is_imported(command, name):
    """The runtime reads it when it is loaded, once."""
    lines = f"""
import os, sys
from scripts import {name} as script
before = []
def run(main):
    before.append("torch" in sys.modules)
script.run = run
script.command()
print(before, os.environ["OMP_WAIT_POLICY"])
"""
    clean = {"OMP_WAIT_POLICY": None, "KMP_BLOCKTIME": None, "GOMP_SPINCOUNT": None}
    env = {key: value for key, value in PLAIN.items() if key not in clean}
    done = subprocess.run([sys.executable, "-c", lines], env=env, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[False] PASSIVE\n", "")


# --- pipes and streams ----------------------------------------------------------------------------------------------

MUCH = "for k in range(100_000): print('line', k)"


@pytest.mark.parametrize("reader", ["head -n 1", "grep -q line", "true"])
def test_a_reader_that_leaves_ends_it_quietly(reader):
    status, _, said = child(MUCH, shell="{} | " + reader + "; exit ${{PIPESTATUS[0]}}")
    assert (status, said) == (141, "")


def test_what_is_left_in_the_buffer_is_no_traceback_either():
    """Python writes it when it ends, after `main`."""
    status, _, said = child("print('one'); time.sleep(0.5)", shell="{} | true; exit ${{PIPESTATUS[0]}}")
    assert (status, said) == (141, "")


def test_work_is_not_lost_with_its_reader(tmp_path):
    work = MUCH + "\nprint('progress', file=sys.stderr)\nopen('done', 'w').close()"
    for number, shell in enumerate(
        ("{} | true", "{} 2>&1 | true", "{} >/dev/full", "{} >&-", "{} 2>&-", "{} >&- 2>&- <&-")
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        child(work, shell=shell, cwd=folder)
        assert (folder / "done").exists(), shell


def test_a_full_disk_behind_standard_output_is_one_line():
    status, _, said = child("print('some')", shell="{} >/dev/full")
    assert status == 2
    assert said.startswith("error: standard output: can't be written (No space left on device); ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams_are_open_on_nothing(tmp_path, closed):
    """Else the first file that is opened gets their number, and with it what is meant for the terminal."""
    work = """
import os
with open('data', 'wb') as file:
    os.write(1, b'for standard output')
    os.write(2, b'for standard error')
    print('printed'); print('warned', file=sys.stderr)
    open('number', 'w').write(str(file.fileno()))"""
    status, _, _ = child(work, shell="{} " + closed, cwd=tmp_path)
    assert status == 0
    assert (tmp_path / "data").read_bytes() == b""
    assert int((tmp_path / "number").read_text()) > 2


def test_a_pipe_that_does_not_wait_gets_everything():
    """Another program on the same terminal or pipe may have made it one that does not wait."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    code = RUN.format("for k in range(50_000): print(k)")
    with subprocess.Popen([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, env=PLAIN) as process:
        os.close(write)
        time.sleep(1)  # it has filled the pipe by then, on most machines; elsewhere this test sees less
        with open(read, "rb") as pipe:
            said = pipe.read()
        assert (process.wait(MINUTE), process.stderr.read()) == (0, b"")
    assert said.split() == [b"%d" % k for k in range(50_000)]


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("ascii", b"gr\\xfcn \\u2192"), ("latin-1", b"gr\xfcn \\u2192"), ("utf-8", "grün →".encode())],
)
def test_letters_that_a_terminal_has_not_are_written_with_backslashes(encoding, expected):
    code = RUN.format("print('gr\\u00fcn \\u2192')")
    env = {**PLAIN, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=MINUTE, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected + b"\n", b"")


def test_progress_without_a_terminal_or_on_one_that_moves_no_cursor(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "dumb")
    assert list(progress.Progress(range(3), "images")) == [0, 1, 2]
    assert "\r" not in terminal.getvalue()
    monkeypatch.setattr(sys, "stderr", None)
    assert list(progress.Progress(range(3), "images")) == [0, 1, 2]


@pytest.mark.parametrize("columns", ["0", "1", "-3", "no number", "100000"])
def test_help_on_a_terminal_of_any_width(command, columns):
    done = command(sys.executable, "scripts/search.py", "--help", env={"COLUMNS": columns, "TERM": "", "LC_ALL": "C"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "--cache-dir" in done.stdout


# --- how it ends ----------------------------------------------------------------------------------------------------


def ended(line):
    status, _, said = child(line)
    assert said.count("\n") == 1, said
    return status, said


def test_what_the_file_system_refuses_is_one_line():
    status, said = ended("open('/proc/self/mem/x')")
    assert status == 2
    assert said.startswith("error: /proc/self/mem/x: can't be used (Not a directory); ")
    status, said = ended("raise OSError('image file is truncated')")
    assert (status, said) == (2, "error: image file is truncated; look at it\n")


@pytest.mark.parametrize(
    "line",
    [
        "raise MemoryError",
        "bytearray(1 << 60)",
        'raise RuntimeError("[enforce fail] . DefaultCPUAllocator: can\'t allocate memory: you tried")',
        "raise RuntimeError('CUDA out of memory. Tried to allocate 20.00 GiB.')",
    ],
)
def test_too_little_memory_is_one_line_with_advice(line):
    status, said = ended(line)
    assert status == 2
    assert said.startswith("error: out of memory")
    assert "make the batches smaller" in said


def test_torchs_own_error_of_memory_is_one():
    assert "make the batches smaller" in ended("import torch; raise torch.OutOfMemoryError('out of memory')")[1]


def test_defects_keep_their_traceback():
    for line in ("raise RecursionError('too deep')", "raise RuntimeError('no memory of that')", "assert False"):
        status, _, said = child(line)
        assert status == 1
        assert said.startswith("Traceback")


def test_messages_move_no_cursor():
    line = "from samer.config import InputError\nraise InputError('a\\x1b[2J\\u202eb.jpg: not there')"
    assert ended(line) == (2, "error: a\\x1b[2J\\u202eb.jpg: not there\n")


@pytest.mark.parametrize("name", ["search", "index", "cache", "train", "verify"])
def test_arguments_that_are_no_text_are_refused_before_the_work(tmp_path, name):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    words = {
        "search": [b"dog", b"--cache-dir", folder],
        "index": [b"--images", b".", b"--cache-dir", folder],
        "cache": [b"--data-root", b".", b"--cache-dir", folder],
        "train": [b"--config", b"configs/demo.yaml", b"train.output_dir=" + folder],
        "verify": [folder],
    }[name]
    done = subprocess.run([sys.executable, f"scripts/{name}.py", *words], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: ")
    assert b"caf\\xe9: not UTF-8" in done.stderr
    assert done.stderr.count(b"\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_can_not_be_stored_is_one_line():
    status, said = ended("open('/dev/null', 'w', encoding='utf-8').write('{\"root\": \"/caf\\udce9\"}')")
    assert status == 2
    assert "/caf\\xe9" in said
    assert "not UTF-8" in said


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------


def interrupt(process, *, times=1):
    for _ in range(times):
        process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=MINUTE)
    return process.returncode, out, said


def start(code, *words, line=None, **settings):
    """A process that is interruptible, however this one was started."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    listen = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    settings = {"env": PLAIN, "cwd": ROOT, "preexec_fn": listen, **pipes, **settings}
    return subprocess.Popen(line or [sys.executable, *(["-c", code] if code else []), *map(str, words)], **settings)


SCENES = {  # what is at work when it comes
    "waiting": "print('go', flush=True); time.sleep(100)",
    "in a pool": """
from samer.runtime.progress import prefetched
def slow(k):
    print('go', flush=True); time.sleep(0.3)
list(prefetched(slow, range(100)))""",
    "in a bare except": """
try:
    print('go', flush=True); time.sleep(100)
except BaseException:
    raise RuntimeError('made of it')""",
    "in a destructor": """
class Slow:
    def __del__(self):
        print('go', flush=True); time.sleep(100)
Slow()""",
    "in an import": """
import os, tempfile
sys.path.insert(0, tempfile.mkdtemp())
lines = ["import time", "try: print('go', flush=True); time.sleep(100)", "except BaseException: print('swallowed')"]
open(os.path.join(sys.path[0], 'slow_module.py'), 'w').write(chr(10).join(lines))
import slow_module""",
    "while a lock is taken": """
from samer.runtime.signals import held
with held():
    print('go', flush=True); time.sleep(1); print('whole')
time.sleep(100)""",
    "in workers": """
import multiprocessing
context = multiprocessing.get_context('fork')
together = context.Barrier(3)
def work():
    together.wait(); time.sleep(100)
workers = [context.Process(target=work, daemon=True) for _ in range(2)]
for worker in workers:
    worker.start()
together.wait()
print('go', flush=True)
for worker in workers:
    worker.join()""",
}


@pytest.mark.parametrize("scene", SCENES)
def test_ctrl_c_is_one_line_and_130(scene):
    process = start(RUN.format(SCENES[scene].replace("\n", "\n    ")), start_new_session=True)
    assert process.stdout.readline() == "go\n"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, said = process.communicate(timeout=MINUTE)
    assert (process.returncode, said) == (130, INTERRUPTED)
    assert out.replace("go\n", "") == ("whole\n" if "lock" in scene else "")


def test_a_second_ctrl_c_does_not_wait():
    lines = """
import threading
thread = threading.Thread(target=time.sleep, args=(100,))
thread.start()
print('go', flush=True)
time.sleep(100)"""
    process = start(RUN.format(lines.replace("\n", "\n    ")))
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == INTERRUPTED  # now it waits for the thread
    assert interrupt(process) == (130, "", "")


def test_ctrl_c_changes_no_status_while_python_ends():
    """Python takes the handler away at its end; then it would kill, and a run that is done would have failed."""
    late = "import os\nclass Late:\n    def __del__(self, write=os.write, sleep=time.sleep):\n"
    late += "        write(1, b'go\\n'); sleep(1)\n"
    for line, status, said in (("pass", 0, ""), ("raise KeyboardInterrupt", 130, INTERRUPTED)):
        process = start(RUN.format(line).replace("def main", late + "late = Late()\ndef main"))
        process.stdout.readline()
        assert interrupt(process) == (status, "", said)


def test_only_the_first_process_of_a_job_says_it():
    for rank, said in (("0", INTERRUPTED), ("1", "")):
        code = RUN.format("print('go', flush=True); time.sleep(100)").replace("run(main)", "run(main, shared=True)")
        process = start(code, env={**PLAIN, "RANK": rank, "WORLD_SIZE": "2"})
        process.stdout.readline()
        assert interrupt(process) == (130, "", said)


def test_a_background_job_goes_on_ignoring_it():
    code = RUN.format("print('go', flush=True); time.sleep(1); print('done')")
    process = start(code, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    process.stdout.readline()
    assert interrupt(process) == (0, "done\n", "")


def test_a_shell_does_not_go_on_after_it(tmp_path):
    line = '"$PYTHON" -c "$CODE" && touch more'
    env = {**PLAIN, "PYTHON": sys.executable, "CODE": RUN.format(SCENES["waiting"])}
    process = start(None, env=env, cwd=tmp_path, start_new_session=True, line=["bash", "-c", line])
    assert process.stdout.readline() == "go\n"
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=MINUTE)
    assert said == INTERRUPTED
    assert process.returncode in (130, -signal.SIGINT)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_at_any_moment_of_a_search(index):
    """From the first line of the script on; before that it is Python's own."""
    rng = random.Random(0)
    for number in range(6):
        code = (
            "import builtins, os, runpy, sys\nsys.argv = sys.argv[1:]\n"
            "from samer.runtime.early import heed_interrupts\nheed_interrupts()\nos.write(1, b'go\\n')\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')"
        )
        process = start(code, "scripts/search.py", "--cache-dir", index)
        assert process.stdout.readline() == "go\n"
        if number:
            time.sleep(rng.choice([0.02, 0.1, 1, 3]) * rng.random())
        status, _, said = interrupt(process)
        lines = said.splitlines(keepends=True)
        assert (status, lines[-1:]) == (130, [INTERRUPTED]), said
        assert len(lines) == 1 or (len(lines) == 2 and "images x" in lines[0]), said


def test_an_interrupted_index_goes_on(world, base, tmp_path):
    words = ["--images", world / "images", "--cache-dir", tmp_path / "c", f"model.name={base}", "--batch-size", "1"]
    process = start(None, "scripts/index.py", *words)
    while "1 of" not in (line := process.stderr.readline()) and "0 of" not in line:
        assert line, "it ended before"
    status, _, said = interrupt(process)
    assert status in (130, 0)
    assert "Traceback" not in said
    assert not list(tmp_path.rglob("*.samer-tmp"))
    assert not list(tmp_path.rglob(".lock"))
    again = start(None, "scripts/index.py", *words)
    assert again.communicate(timeout=5 * MINUTE)[0].count("images x at most") == 1
    assert again.returncode == 0


# --- queries --------------------------------------------------------------------------------------------------------


def asked(data, monkeypatch, encoding="utf-8"):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data)), encoding=encoding))
    return [(each.text, each.place, each.problem.split(";")[0]) for each in queries.typed_queries()]


def test_lines_of_a_file(monkeypatch):
    data = b"one\r\n\n   \r\ntwo\xff\n  three \nfour\0\n" + b"x" * 250_000 + b"\n\xef\xbb\xbffive\nsix"
    assert asked(codecs.BOM_UTF8 + data, monkeypatch) == [
        ("one", "line 1", ""),
        ("", "line 4", "not utf-8-sig"),
        ("three", "line 5", ""),
        ("four\0", "line 6", ""),
        ("", "line 7", "more than 100,000 characters"),
        ("five", "line 8", ""),
        ("six", "line 9", ""),
    ]
    assert asked(b"", monkeypatch) == []


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_files_with_a_mark_are_decoded_by_it(monkeypatch, encoding):
    data = "ein grünes Schild\r\n\r\n日本".encode(encoding)
    for locale in ("utf-8", "latin-1", "ascii"):
        assert asked(data, monkeypatch, locale) == [("ein grünes Schild", "line 1", ""), ("日本", "line 3", "")]


def test_files_without_a_mark_are_what_the_locale_says(monkeypatch):
    data = "grün\nrot".encode("latin-1")
    assert asked(data, monkeypatch, "latin-1") == [("grün", "line 1", ""), ("rot", "line 2", "")]
    assert asked(data, monkeypatch) == [("", "line 1", "not utf-8"), ("rot", "line 2", "")]


def test_standard_input_stays_open_and_a_closed_one_is_told(monkeypatch):
    asked(b"a\n", monkeypatch)
    assert not sys.stdin.buffer.closed
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="standard input is closed; give the queries as arguments"):
        queries.typed_queries()


def test_a_file_with_bad_lines_is_answered_and_ends_with_2(index):
    data = b"a dog\n\nbad \xff\nan <image>\n\na cat"
    words = [sys.executable, "scripts/search.py", "--cache-dir", index, "--json", "--top", "1"]
    done = subprocess.run(words, cwd=ROOT, env=PLAIN, input=data, capture_output=True, timeout=5 * MINUTE, check=False)
    assert done.returncode == 2
    assert [json.loads(line)["query"] for line in done.stdout.splitlines()] == ["a dog", "a cat"]
    errors = [line for line in done.stderr.decode().splitlines() if line.startswith("error:")]
    assert errors[0].startswith("error: line 3: not utf-8; ")
    assert errors[1].startswith("error: line 4: query 'an <image>' holds <image>")
    assert errors[2].startswith("error: 2 of the queries could not be answered")
    assert len(errors) == 3


def test_arguments_after_a_bad_one_are_answered(index, script, capsys):
    words = ["a dog", "an <image>", "a cat", "--cache-dir", str(index), "--json"]
    with pytest.raises(InputError, match="1 of the queries could not be answered"):
        script("search").main(words)
    said = capsys.readouterr()
    assert [json.loads(line)["query"] for line in said.out.splitlines()] == ["a dog", "a cat"]
    assert "error: query 2: query 'an <image>' holds <image>" in said.err


def test_a_long_session_keeps_no_answers(opened, monkeypatch):
    """Growth over 150 queries, after those that fill what is kept for the next time."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.FileIO(os.devnull, "w")))

    def session(first, last):
        for _ in answers.answers(opened, (queries.Asked(f"car number {k}") for k in range(first, last)), 8, False):
            pass
        gc.collect()
        return sum(type(each) is torch.Tensor for each in gc.get_objects())

    session(0, 60)
    tracemalloc.start()
    try:
        tensors = session(60, 120)
        before = tracemalloc.get_traced_memory()[0]
        assert session(120, 270) <= tensors + 4
        assert tracemalloc.get_traced_memory()[0] - before < 150 * 1000  # a list of answers takes 2 kB each, and more
    finally:
        tracemalloc.stop()


def test_a_session_ends_with_its_reader(opened, monkeypatch):
    """However many queries are still to come."""
    taken = []

    def endless():
        while True:
            taken.append(queries.Asked("a dog"))
            yield taken[-1]

    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", streams.Lasting(io.FileIO(write, "w"), write_through=True))
    assert len(list(answers.answers(opened, endless(), 3, True))) == 1
    assert len(taken) == 1


# --- what is printed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b/ü 日本 \N{FAMILY}\u200d.jpg", "a b/ü 日本 \N{FAMILY}\u200d.jpg"),
        ("a\nb\r\t.jpg", "a\\nb\\r\\t.jpg"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("gpj\u202e.exe\u2028", "gpj\\u202e.exe\\u2028"),
        ("caf\udce9", "caf\\xe9"),
        ("\ud83d", "\\ud83d"),
        ("\x9b2J", "\\x9b2J"),
    ],
)
def test_names_are_one_line(text, shown):
    assert streams.printable(text) == shown
    shown.encode()


class Small:
    """An index that finds two oddly named pictures."""

    root = Path("/pictures")
    columns = MappingProxyType({})

    def search(self, text, top):
        names = [("a\nb\x1b[2J.jpg", 0.5), ("caf\udce9.jpg", 0.25)]
        return Found(names[:top], ["gone", None][:top], None, 1.0, 1.0)


def test_odd_names_keep_a_line_each_and_json_is_exact(capsys):
    answers.answer(Small(), "a\tdog", 2, False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("a\\tdog   (")
    assert lines[1:] == ["  1  0.5000  /pictures/a\\nb\\x1b[2J.jpg (gone)", "  2  0.2500  /pictures/caf\\xe9.jpg"]
    answers.answer(Small(), "grün", 2, True)
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert [row["id"] for row in found["results"]] == ["a\nb\x1b[2J.jpg", "caf\udce9.jpg"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_valid_whatever_the_terminal_writes(monkeypatch, encoding):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", out)
    value = {"query": "grün 日本 \udce9"}
    print(answers.as_line(value), flush=True)
    assert json.loads(out.buffer.getvalue().decode("ascii")) == value
    whole = answers.as_line({"query": "grün"})
    assert ("grün" in whole) == (encoding != "ascii")
    assert json.loads(whole) == {"query": "grün"}


# --- a terminal -----------------------------------------------------------------------------------------------------


def conversation(words, steps, **settings):
    """Runs on a terminal of its own: waits for each text, then types the next; the status and all that was shown.

    What is typed last is typed until it ends: readline misses a signal that comes as it begins to wait.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.execve(sys.executable, [sys.executable, *map(str, words)], {**PLAIN, "TERM": "xterm", **settings})
    shown, deadline, place = "", time.monotonic() + 5 * MINUTE, 0
    steps = list(steps)
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 1)[0]:
            try:
                shown += os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # it has ended
                break
        elif steps[0][0] in shown[place:]:  # and nothing more came for a second
            os.write(terminal, steps[0][1])
            if len(steps) > 1:
                place = len(shown)
                steps.pop(0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.replace("\r\n", "\n")


def test_the_prompt_edits_lines_knows_those_before_and_hears_ctrl_c(index):
    pytest.importorskip("readline")
    steps = [
        ("query> ", b"a dogx\x7f\n"),  # a letter taken back
        ("query> ", b"\x1b[A and a cat\n"),  # the line before, and more
        ("query> ", b"\x03"),
    ]
    status, shown = conversation(["scripts/search.py", "--cache-dir", index, "--top", "1"], steps)
    assert "\na dog   (" in shown
    assert "\na dog and a cat   (" in shown
    assert status == 130
    assert shown.rpartition("query> ")[2].replace("^C", "").lstrip("\n") == INTERRUPTED


def test_the_prompt_is_not_part_of_what_is_stored(index, tmp_path):
    """Standard output goes to a file, the prompt to the terminal; Ctrl-D ends it on a line of its own."""
    line = f"import os, sys; os.dup2(os.open({str(tmp_path / 'out')!r}, 65, 0o600), 1); sys.argv = sys.argv[1:]; "
    line += "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    words = ["-c", line, "scripts/search.py", "--cache-dir", index, "--json", "--top", "1"]
    status, shown = conversation(words, [("query> ", b"a dog\n"), ("query> ", b"\x04")])
    assert status == 0
    assert shown.count("query> ") == 2
    assert shown.endswith("\n")
    (found,) = (tmp_path / "out").read_text().splitlines()
    assert json.loads(found)["query"] == "a dog"
