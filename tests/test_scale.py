"""assets/SCALE.md is what scripts/scale.py computes, and what that computes is right."""

import re
from pathlib import Path

import pytest

from samer.report import scale
from samer.report.scale import Measured

ROOT = Path(__file__).resolve().parents[1]


def cells(text, name):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_the_page_is_what_the_script_writes(script, tmp_path, capsys):
    text = script("scale").main(["--out", str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == text
    assert (ROOT / "assets/SCALE.md").read_text(encoding="utf-8") == text
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 120


@pytest.mark.parametrize("dtype", scale.STORED)
def test_bytes_are_those_of_a_real_shard(dtype):
    # a vector with its place in the mask; codes have none, where all vectors are there
    vector = {"float16": 256 + 1, "int8": 128 + 1, "binary": 16 + 256 + 1, "1bit": 16}[dtype]
    common = {"int8": 4, "1bit": 128 + 4}.get(dtype, 0)  # a scale, a base
    least = 64 * vector + common + 8 + 1024  # and a grid, patches
    found = scale.shard_bytes(dtype, 64)
    share = 200 if dtype == "binary" else 100  # an id, a hash, and a share of the header, in each of the files
    assert least < found < least + share
    assert scale.shard_bytes(dtype, 64, assignments=False) == pytest.approx(found - 1024, abs=1)
    own = {"float16": 64 * 257, "int8": 64 * 129 + 4, "binary": 64 * 17, "1bit": 64 * 16 + 132}[dtype]
    assert scale.scan_bytes(dtype, 64) == own


def test_hours_machines_and_engines():
    measured = Measured(encoded=100, merged=0.01, read=30, cpu_scan=0.5, gpu_scan=0.01, gpu_memory=1e9)
    text = scale.page([1_000_000, 50_000_000], 64, measured)
    assert cells(text, "GPU hours, encoding and merging") == ["5.56", "278"]  # 0.02 s an image
    assert cells(text, "on 1 GPU") == ["5.56 hours", "11.6 days"]
    assert cells(text, "on 1,024 GPUs") == ["19.5 s", "16.3 minutes"]
    assert cells(text, "parts of a job array, a day on one GPU each") == ["1", "12"]
    assert cells(text, "all 1,030 vectors, float16") == ["264 GB", "13.2 TB"]
    assert cells(text, "of int8, what a search reads") == ["8.26 GB", "413 GB"]
    assert cells(text, "shards of 1,024") == ["977", "48,829"]
    fit = [cell for cell in text.splitlines() if cell.startswith("| GPUs that hold it in")]
    assert [re.findall(r"\| (\d+) ", each) for each in fit] == [["9", "413"], ["2", "58"]]
    assert "wants 4 CPU threads" in text


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (10**6, "`scripts/search.py`, 2 cores: 1 s"),
        (10**6 + 1, "`scripts/search.py`, a GPU: 25 ms"),
        (14 * 10**6, "`scripts/search.py`, a GPU: 350 ms"),
        (15 * 10**6, "a cluster by `scripts/export.py`"),
    ],
)
def test_the_engine_is_the_first_that_serves(images, found):
    assert scale.engine_for(images, 64, Measured()).startswith(found)


@pytest.mark.parametrize("words", [["--images", "0"], ["--encoded", "-1"], ["--cpu-scan", "-2"]])
def test_numbers_that_are_none(script, words, capsys):
    with pytest.raises(SystemExit):
        script("scale").main(words)
    assert "must be more than 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [(999, "999 bytes"), (1e6, "1 MB"), (8.26e9, "8.26 GB"), (1.5e15, "1.5 PB"), (2.6e18, "2,600 PB")],
)
def test_sizes(value, text):
    assert scale.size(value) == text
