"""scripts/photos.py with small towers on the generated world: from towers to tables, killed on the way, run again."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from small_towers import save_text, save_vision

from samer.retrievers.hf import Retriever

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def words(world, tmp_path_factory):
    place = tmp_path_factory.mktemp("towers")
    towers = ["--vision", str(save_vision(place / "vision")), "--text", str(save_text(place / "text"))]
    settings = ["align.images_per_step=3", "align.epochs=2", "align.captions=0", "towers.hidden_size=24"]
    settings += ["towers.embedding_dim=8"]
    asked = ["--sizes", "32", "--seeds", "0", "--sections", "untouched", "banks", "phrases"]
    return [str(world), *towers, *asked, "--align", *settings]


@pytest.fixture(scope="module")
def run_through(words, tmp_path_factory, script):
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("photos")
    with redirect_stdout(StringIO()) as told:
        script("photos").main([*words, "--out", str(out)])
    (out / "told").write_text(told.getvalue())
    return out / "photographs" / "32"


def test_it_says_beforehand_what_there_is_to_do_and_how_long_it_takes(run_through):
    told = (run_through.parents[1] / "told").read_text()
    before = told[: told.index("== align the towers")]
    for said in ("32 pixels: about", "0 trainings", str(run_through)):
        assert said in before


def test_every_training_is_counted_beforehand(words, script, tmp_path, monkeypatch):
    """13 at K = 4, two more of the components, two at each other budget (2, 8, 16, 32), and eleven at K = 2."""
    found = []
    monkeypatch.setattr("samer.compare.forecast.forecast", lambda model, work, device: found.append(work) or {})
    photos = script("photos")
    monkeypatch.setattr(photos, "step", lambda *words: None)
    monkeypatch.setattr("samer.retrievers.hf.Retriever.load", lambda *_: SimpleNamespace(grid=(8, 8)))
    every = [word for word in words if word not in ("--sections", "untouched", "banks", "phrases")]
    photos.main([*every, "--seeds", "0", "1", "--out", str(tmp_path)])
    assert found[0].trainings == 2 * (13 + 2 + 2 * 4 + 11)


def test_it_ends_with_tables_and_a_retriever(run_through):
    page = (run_through / "compare" / "results.md").read_text()
    assert "K = 4" in page  # 8 x 8 patches / 16
    assert "K = 2" in (run_through / "compare_few" / "results.md").read_text()
    assert "can these queries tell compressors apart" in page.lower()
    assert Retriever.load(str(run_through / "retriever")).grid == (8, 8)
    rows = json.loads((run_through / "compare_banks" / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows[2:]] == ["querybank", "querybank, half its words", "querybank, 256 vectors"]


def test_half_of_the_vocabulary_is_left_out(script):
    texts = ["A red dog runs .", "a blue cat runs", "red"]
    left = script("photos").without_half(texts)
    before, after = ({word for text in some for word in text.lower().split()} for some in (texts, left))
    assert after < before
    assert len(after) == len(before) - len(before) // 2
    kept = [" ".join(word for word in text.split() if word.lower() in after) for text in texts]
    assert left == [text for text in kept if text]


def test_larger_pictures_start_from_the_first_retriever_and_scenes_have_their_own(words, script, tmp_path, monkeypatch):
    photos, steps = script("photos"), []
    monkeypatch.setattr(photos, "announce", lambda *_: None)
    monkeypatch.setattr(photos, "step", lambda title, _, *words: steps.append((title, [str(word) for word in words])))
    monkeypatch.setattr("samer.retrievers.hf.Retriever.load", lambda *_: SimpleNamespace(grid=(8, 8)))
    monkeypatch.setattr(photos, "banks", lambda place, pictures, _: {"other pictures": pictures.other})
    more = ["--sizes", "32", "64", "--cutouts", "cutouts", "--backgrounds", "behind", "--skip", "flags"]
    photos.main([*words, *more, "--out", str(tmp_path)])
    starts = [[word for word in words if "align.start" in word] for title, words in steps if "align" in title]
    first, of_collages = (f"align.start={tmp_path / kind / '32' / 'retriever'}" for kind in ("photographs", "collages"))
    assert starts == [[], [first], [], [of_collages]]
    scenes = [words for title, words in steps if "align" in title][2]
    assert {"data.train_split=train", "towers.vision_layers=0"} <= set(scenes)
    compared = [words for title, words in steps if title.startswith("compare")]
    assert ["data.train_split=train" in words for words in compared] == [False] * 6 + [True] * 6
    others = [word for words in compared for word in words if word.startswith("other pictures=")]
    scenes = f"other pictures={tmp_path / 'collages' / 'scenes'}"
    assert others == [scenes, scenes, f"other pictures={words[0]}", f"other pictures={words[0]}"]
    (made,) = (words for title, words in steps if title == "collages")
    assert made[made.index("--skip") :] == ["--skip", "flags"]


def test_of_many_patches_the_main_rows_are_compared(script):
    photos = script("photos")
    options = SimpleNamespace(sections=[], methods=[], seeds=[0])
    found = photos.comparisons(1024, options, photos.PHOTOGRAPHS)
    assert {name: asked.regions for name, asked in found.items()} == {
        "compare": 64, "compare_64": 64, "compare_32": 32, "compare_16": 16,
    }  # fmt: skip
    assert "hpool" not in found["compare"].methods
    assert "hpool" in found["compare_64"].methods
    assert [list(asked.sections) for asked in found.values()][1:] == [["untouched"]] * 3
    assert photos.comparisons(1024, SimpleNamespace(sections=["cost"], methods=[]), photos.PHOTOGRAPHS) == {}


def test_killed_at_any_step_it_goes_on_to_the_same_retriever(run_through, words, tmp_path):
    out = tmp_path / "photos"
    place = out / "photographs" / "32"
    marks = (  # what is there once a step is at work
        place / "retriever" / "align.yaml",
        place / "features" / "base.safetensors",
        place / "compare",
    )
    line = [sys.executable, str(ROOT / "scripts" / "photos.py"), *words, "--out", str(out)]
    quiet = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for mark in marks:
        job = subprocess.Popen(line, **quiet)
        while not mark.exists() and job.poll() is None:
            time.sleep(0.02)
        job.send_signal(signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
    assert subprocess.run(line, check=False, **quiet).returncode == 0
    first, second = (load_file(each / "retriever" / "model.safetensors") for each in (run_through, place))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.shape == second[name].shape
        assert abs(value - second[name]).max() < 1e-5, name  # one thread here, perhaps more there
    assert (place / "compare" / "results.md").is_file()


def test_what_does_not_go_together_is_refused(words, script, capsys):
    with pytest.raises(SystemExit):
        script("photos").main([*words[:1], "--cutouts", "somewhere"])
    assert "--cutouts and --backgrounds go together" in capsys.readouterr().err
