"""Shared by the tests: the repo root on the path, a small world and a small ColPali of the real classes, made once."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
hypothesis.settings.register_profile("samer", deadline=None, derandomize=True)  # no timed tests, the same cases always
hypothesis.settings.load_profile("samer")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network is a defect


def asks_for_gpu(expression):
    """Whether pytest's -m names the mark gpu, and not to leave it out."""
    return re.search(r"(?<!not )\bgpu\b", expression) is not None


def pytest_configure(config):
    config.addinivalue_line("markers", "browser: drives a headless Chromium; skipped where there is none")
    if not asks_for_gpu(config.getoption("markexpr")):  # results are compared with those of float32 on the CPU
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch counts devices at their first use; children inherit it


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and `-m gpu`, without which none is seen")


NO_CODE = Counter()  # outcomes of tests/faults/test_no_code.py, whose tests are cases of the table of faults


def pytest_runtest_logreport(report):
    if report.when == "call" and report.location[0].endswith("test_no_code.py"):
        NO_CODE.update([report.outcome])
        NO_CODE["seconds"] += report.duration


def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput"):  # a worker's outcomes reach the process that started it, too
        return
    cases = NO_CODE["passed"] + NO_CODE["failed"]
    if cases and (log := os.environ.get("SAMER_FAULT_LOG")):
        row = {"group": "code in data", "cases": cases, "survived": NO_CODE["passed"], "bytes_lost": 0}
        with open(log, "a", encoding="utf-8") as lines:
            lines.write(json.dumps({**row, "seconds": round(NO_CODE["seconds"], 2)}) + "\n")


@pytest.fixture(scope="module", autouse=True)
def registry_order():
    """Monkeypatch puts what was taken out of the registry back at its end; the next module has it as it is shipped."""
    from samer.compressors import COMPRESSORS

    held = dict(COMPRESSORS)
    yield
    COMPRESSORS.clear()
    COMPRESSORS.update(held)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A generated world: 12 train, 6 val and 8 test images."""
    from samer.world.write import write_world

    folder = tmp_path_factory.mktemp("world") / "world"
    write_world(folder, {"train": 12, "val": 6, "test": 8}, seed=7, workers=1)
    return folder


def save_colpali(folder, image_size, patch_size):
    """Writes a random ColPali with 6 prompt tokens in transformers format (float16)."""
    from samer.world.retriever import Geometry, build_colpali, page_texts, train_tokenizer

    geometry = Geometry(
        image_size=image_size,
        patch_size=patch_size,
        vision_width=32,
        vision_layers=1,
        vision_mlp=32,
        text_width=32,
        text_layers=2,
        text_mlp=32,
        heads=2,
        embedding_dim=16,
    )
    model, processor = build_colpali(train_tokenizer(page_texts(20, 0), 500), geometry, seed=1)
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A random ColPali with 8 x 8 patches of 64 x 64 pixels."""
    return save_colpali(tmp_path_factory.mktemp("base") / "retriever", 64, 8)


@pytest.fixture
def retriever(base):
    """The small ColPali, loaded afresh in float32."""
    from samer.retrievers.hf import Retriever

    return Retriever.load(str(base), dtype=torch.float32)


@pytest.fixture(scope="session")
def chromium():
    """A running Chromium; Playwright allows one in a process."""
    from browser import launched

    yield from launched()


@pytest.fixture(scope="session")
def script():
    """Loads scripts/<name>.py as a module, so that a test calls its main([...])."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def command():
    """Runs a command as a user would, from the repo root; returns the finished process with text output."""

    def run(*words, cwd=ROOT, env=None, timeout=1200):  # a hang, on any machine
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return subprocess.run(
            [str(word) for word in words],
            cwd=cwd,
            env={**clean, **(env or {})},
            timeout=timeout,
            capture_output=True,
            text=True,
        )

    return run
