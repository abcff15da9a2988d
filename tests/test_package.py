"""What a stranger gets: an installable package, a list of requirements that is one list, a README that holds."""

import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import samer
from samer.config import load_config

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
COMMANDS = PROJECT["project"]["scripts"]
NAMES = (
    "train",
    "align",
    "cache",
    "bank",
    "recode",
    "layers",
    "calibrate",
    "reduce",
    "eval",
    "index",
    "search",
    "serve",
    "features",
    "compare",
    "report",
    "verify",
    "compress",
    "export",
    "tasks",
    "scale",
    "select_captions",
    "seps_train",
    "seps_eval",
    "describe",
    "choices",
)
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "assets").glob("*.md")), *sorted((ROOT / "assets/results").glob("*.md"))]


def base_set():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


# --- the package ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built in a copy of it, without a network."""
    setuptools = pytest.importorskip("setuptools", reason="needs setuptools (the extra `test`)")
    if Version(setuptools.__version__).major < 77:
        pytest.skip(f"needs setuptools 77 or newer, to build a wheel; here is {setuptools.__version__}")
    source = tmp_path_factory.mktemp("source")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("samer", "scripts"):
        shutil.copytree(ROOT / name, source / name, ignore=skip)
    for name in ("pyproject.toml", "requirements.txt", "README.md"):
        shutil.copy(ROOT / name, source)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return source / "dist" / done.stdout.split()[-1]


def test_a_wheel_holds_every_file_of_the_rooms(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    ours = {path for path in (ROOT / "samer").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    expected = {path.relative_to(ROOT).as_posix() for path in ours}
    expected |= {f"samer/scripts/{path.name}" for path in ROOT.glob("scripts/*.py")}
    assert names == expected
    assert {"samer/report/report.html", "samer/search/page/index.html", "samer/search/page/page.js"} <= names


def test_a_wheel_asks_for_what_the_lists_say(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (place,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        about = Parser().parsestr(archive.read(place).decode())
    assert (about["Name"], about["Version"], about["Requires-Python"]) == ("samer", samer.__version__, ">=3.11")
    asked = [Requirement(line) for line in about.get_all("Requires-Dist")]
    plain = {(need.name, need.specifier) for need in asked if need.marker is None}
    assert plain == {(need.name, need.specifier) for need in base_set()}
    for extra, lines in PROJECT["project"]["optional-dependencies"].items():
        named = {
            (need.name, need.specifier) for need in asked if need.marker and need.marker.evaluate({"extra": extra})
        }
        assert named == {(Requirement(line).name, Requirement(line).specifier) for line in lines}


RUN_ALL = """
import contextlib, importlib, io, json, os, sys
texts = {}
for name, place in json.loads(sys.argv[1]).items():
    module, _, function = place.partition(":")
    loaded = importlib.import_module(module)
    sys.argv = [name, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            getattr(loaded, function)()
        except SystemExit as stop:
            texts[name] = [stop.code, text.getvalue(), loaded.__file__]
rooms = [folder for folder in sys.path if os.path.basename(folder) in ("samer", "scripts")]
print(json.dumps([texts, rooms]))
"""


def test_the_commands_of_a_wheel_run_anywhere(wheel, command, tmp_path):
    """From another folder; and no folder of the package lands on sys.path, where `report` or `data` would be names."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    (tmp_path / "elsewhere").mkdir()
    words = ("-P", "-c", RUN_ALL, json.dumps(COMMANDS))
    done = command(sys.executable, *words, cwd=tmp_path / "elsewhere", env={"PYTHONPATH": str(tmp_path / "installed")})
    assert done.returncode == 0, done.stderr
    texts, rooms = json.loads(done.stdout.splitlines()[-1])
    assert rooms == []
    assert list(texts) == list(COMMANDS)
    for name, (status, text, place) in texts.items():
        assert status == 0
        assert text.startswith(f"usage: {name} ")
        assert place.startswith(str(tmp_path / "installed"))


def test_every_command_is_a_script_that_can_be_called():
    assert {f"samer-{name}": f"samer.scripts.{name}:command" for name in NAMES} == COMMANDS
    for name in NAMES:
        assert callable(importlib.import_module(f"scripts.{name}").command)


def test_every_room_is_a_package_that_is_installed():
    rooms = {path.parent.relative_to(ROOT) for path in (ROOT / "samer").rglob("__init__.py")}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(
        [".".join(room.parts) for room in rooms] + ["samer.scripts"]
    )


def test_a_script_runs_from_another_folder(command, tmp_path):
    done = command(sys.executable, ROOT / "scripts" / "verify.py", "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: verify.py ")


# --- the environment that launchers make ----------------------------------------------------------------------------

HOST = """#!/usr/bin/env bash
case "$1 $2" in
    "- "*) cat >/dev/null; exit 1 ;;
    "-m venv") mkdir -p "$3/bin"; cp "$STUBS/venv-python" "$3/bin/python" ;;
    *) exit 0 ;;
esac
"""
VENV = """#!/usr/bin/env bash
case "$*" in
    -*) [ "$1" != - ] || { cat >/dev/null; [ -e installed ] || printf 'torch>=2.9\\npyyaml>=6.0\\n'; exit 0; } ;;
esac
case "$*" in
    *"config list"*) printf '%s' "$PIP_SETTINGS" ;;
    *install*) echo "$*" >>pip.log; [[ $* != *"$FAILS"* ]] ;;
esac
"""
CPU = "--index-url https://download.pytorch.org/whl/cpu"


def script_file(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("case", "settings", "fails", "torch"),
    [
        ("cpu", "", "nothing fails", [CPU]),
        ("cpu", "", "download.pytorch.org", [CPU, ""]),
        ("cpu", "global.index-url='https://mirror.example/simple'\n", "nothing fails", [""]),
        ("cpu", "global.find-links='/wheels'\n", "nothing fails", [""]),
        ("nvidia", "", "nothing fails", [""]),
    ],
)
def test_a_new_environment_gets_a_fitting_torch(command, tmp_path, case, settings, fails, torch):
    """With interpreters that only say what they were asked to do."""
    path = f"{tmp_path / 'stubs'}:/usr/bin:/bin"
    if case == "cpu" and (shutil.which("nvidia-smi", path=path) or Path("/proc/driver/nvidia").exists()):
        pytest.skip("here is an NVIDIA driver")
    (tmp_path / "stubs").mkdir()
    script_file(tmp_path / "stubs" / "python3", HOST)
    script_file(tmp_path / "stubs" / "python", HOST)
    script_file(tmp_path / "stubs" / "venv-python", VENV)
    if case == "nvidia":
        script_file(tmp_path / "stubs" / "nvidia-smi", "#!/bin/sh\n")
    (tmp_path / "bash").mkdir()
    shutil.copy(ROOT / "bash" / "env.sh", tmp_path / "bash")
    env = {"PATH": path, "STUBS": str(tmp_path / "stubs"), "PIP_SETTINGS": settings, "FAILS": fails}
    line = "source bash/env.sh; prepare serve test; echo PYTHON=$PYTHON"
    done = command("bash", "-c", line, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert ("7 GB on disk, with the CUDA build" if case == "nvidia" else "1.7 GB on disk, with the CPU build") in said[
        0
    ]
    assert "pip install -e '.[serve,test]'" in said[1]
    assert said[-2].endswith("source .venv/bin/activate")
    assert said[-1] == "PYTHON=.venv/bin/python"
    quiet = "-m pip install --quiet --disable-pip-version-check"
    asked = [f"{quiet} torch==2.13.0 {index}".rstrip() for index in torch]
    assert (tmp_path / "pip.log").read_text().splitlines() == [*asked, f"{quiet} -r /dev/stdin"]


def test_the_launchers_read_the_same_lists(command):
    line = 'source bash/env.sh; missing "$0" serve test && echo nothing else'
    done = command("bash", "-c", line, sys.executable)
    assert (done.returncode, done.stderr) == (0, "")
    lacking = {Requirement(line).name for line in done.stdout.splitlines()[:-1]}
    assert done.stdout.splitlines()[-1] == "nothing else"
    needed = {need.name for need in base_set()}
    for extra in ("serve", "test"):
        needed |= {Requirement(line).name for line in PROJECT["project"]["optional-dependencies"][extra]}
    assert lacking <= needed
    assert not {need.name for need in base_set()} & lacking  # the tests run on the base set


def test_the_torch_of_a_new_environment_is_in_the_range():
    pinned = re.search(r"^TORCH=(\S+)", (ROOT / "bash" / "env.sh").read_text(), re.MULTILINE)[1]
    (torch,) = [need for need in base_set() if need.name == "torch"]
    assert torch.specifier.contains(pinned)
    assert torch.specifier.contains("2.9.0")
    assert not torch.specifier.contains("2.8.0")


# --- README and pages -----------------------------------------------------------------------------------------------


def blocks(language):
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", README, re.DOTALL | re.MULTILINE)


def test_the_readme_is_short():
    assert len(README.splitlines()) < 180


def test_the_snippet_of_the_readme_runs():
    (code,) = blocks("python")
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["merged"].tokens.shape == (8, 64, 128)
    assert names["scores"].shape == (3, 8)


def anchors(page):
    """What a link can name in a page: its headings, as they are written in addresses."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        file, _, heading = link.partition("#")
        if not link.startswith("http"):
            target = page.parent / file if file else page
            assert target.exists(), f"{page.name}: {link}"
            assert not heading or heading in anchors(target), f"{page.name}: no heading {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_in_the_pages_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in set(re.findall(r"`(samer(?:\.\w+)+)`", text)):
        module, _, value = name.rpartition(".")
        assert hasattr(importlib.import_module(module), value), f"{page.name}: {name}"
    for name in set(
        re.findall(r"(?<![\w/.])((?:samer|scripts|bash|tests|configs)/[\w/]+\.(?:py|sh|yaml|txt|md))\b", text)
    ):
        assert (ROOT / name).is_file(), f"{page.name}: {name}"
    assert set(re.findall(r"`(samer-\w+)`", text)) <= set(COMMANDS)


def lines_of_the_readme():
    """Words of every command of the README's shell blocks, without variables in front."""
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words and words[0] in ("python", "bash"):
                yield words


def test_commands_in_the_readme_are_what_the_scripts_take():
    seen = set()
    for _, script, *words in lines_of_the_readme():
        source = (ROOT / script).read_text(encoding="utf-8")
        seen.add(script)
        if script.startswith("scripts/"):
            strings = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
            assert {word for word in words if word.startswith("--")} <= strings, f"{script}: {words}"
        load_config(None, [word for word in words if re.match(r"[a-z]+\.\w+=", word)])
    assert {"bash/demo.sh", "bash/test.sh", "bash/train.sh", "bash/cache.sh", "bash/inference.sh"} <= seen


def test_variables_in_the_readme_are_what_the_launchers_read():
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            launcher = re.search(r"bash (bash/\w+\.sh)", line)
            if launcher:
                source = (ROOT / launcher[1]).read_text(encoding="utf-8") + (ROOT / "bash" / "env.sh").read_text()
                for name in re.findall(r"(?:^|\s)([A-Z_]+)=", line):
                    assert name in source, f"{launcher[1]}: {name}"


def test_nothing_of_a_workplace_is_named():
    """The one address that installers name is PyTorch's own, which its documentation gives."""
    hosts = re.compile(r"https?://([\w.-]+)")
    for path in (ROOT / "pyproject.toml", ROOT / "requirements.txt", ROOT / ".ci" / "run", *ROOT.glob("bash/*.sh")):
        assert set(hosts.findall(path.read_text(encoding="utf-8"))) <= {"download.pytorch.org", "127.0.0.1"}, path.name
