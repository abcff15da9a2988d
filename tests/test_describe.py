"""Dense texts by a tiny random model: resumed to the same file, refused where they can't go on, read by SEPS."""

import json
from pathlib import Path

import pytest
import torch
from small_llava import save_llava

from samer.config import InputError
from samer.data import flickr
from samer.runtime.signals import Stopped
from samer.seps import describe
from samer.seps.data import read_split
from samer.seps.describe import Wording, describe_images
from samer.seps.settings import SepsData

CPU = torch.device("cpu")
SHORT = Wording(max_new_tokens=6)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_llava(tmp_path_factory.mktemp("llava") / "model"))


@pytest.fixture
def records(world):
    return flickr.load_split(world, "val", boxes=False)


def test_the_command_writes_what_seps_reads(model, world, tmp_path, script, capsys):
    out = tmp_path / "world_val.jsonl"
    words = ["--model", model, "--data-root", str(world), "--split", "val", "--out", str(out), "--max-new-tokens", "6"]
    assert script("describe").main(words) == 6
    assert "6 of 6 images described now" in capsys.readouterr().out
    assert script("describe").main(words) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["image_id"] for row in rows] == [r.image_id for r in flickr.load_split(world, "val", boxes=False)]
    assert {row["model_id"] for row in rows} == {model}
    assert all(row["metadata"] == {"length": len(row["text"])} for row in rows)
    assert len({row["text"] for row in rows}) > 1
    found = read_split(SepsData(str(world), dense=str(tmp_path)), "val", None, dense=True)
    assert list(found.dense.values()) == [" ".join(row["text"].split()) for row in rows]


def test_a_run_that_was_cut_short_goes_on_to_the_same_words(model, records, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert describe_images(records, whole, model, SHORT, CPU) == 6
    seen = []

    def stop():
        seen.append(1)
        if len(seen) == 4:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(describe, "stop_here", stop)
        with pytest.raises(Stopped):
            describe_images(records, cut, model, SHORT, CPU)
    assert len(cut.read_text().splitlines()) == 3
    with open(cut, "a") as lines:
        lines.write('{"image_id": "' + records[3].image_id)  # killed within a line
    assert describe_images(records, cut, model, SHORT, CPU) == 3
    assert cut.read_text() == whole.read_text()


def test_the_prompt_and_the_settings_reach_the_model(model, records, tmp_path):
    texts = []
    plain = {"temperature": 0, "max_new_tokens": 6}
    asked = Wording(**plain), Wording(**plain, seed=1), Wording("Name one.", **plain), Wording("", 6, 5.0, seed=1)
    for number, wording in enumerate(asked):
        out = tmp_path / f"{number}.jsonl"
        describe_images(records[:2], out, model, wording, CPU)
        texts.append([json.loads(line)["text"] for line in out.read_text().splitlines()])
    assert texts[0] == texts[1]  # the likeliest words know no seed
    assert texts[0] != texts[2]
    assert texts[0] != texts[3]


def test_a_model_without_a_chat_template_is_asked_plainly(records, tmp_path):
    plain = str(save_llava(tmp_path / "plain", chat=False))
    out = tmp_path / "out.jsonl"
    assert describe_images(records[:1], out, plain, Wording("<image> What is there?", 6, 0.0), CPU) == 1
    assert "What is there" not in json.loads(out.read_text())["text"]


def test_what_cannot_go_on_is_refused(model, records, tmp_path):
    out = tmp_path / "out.jsonl"
    describe_images(records[:1], out, model, SHORT, CPU)
    with pytest.raises(InputError, match=r"line 1 was written by .*, not other; name another --out"):
        describe_images(records, out, "other", SHORT, CPU)
    out.write_text("A dog.\n")
    with pytest.raises(InputError, match="line 1 is none that this script wrote"):
        describe_images(records, out, model, SHORT, CPU)
    out.unlink()
    with pytest.raises(InputError, match="can't be loaded as an image-text-to-text model"):
        describe_images(records, out, str(tmp_path), SHORT, CPU)
    for settings in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}):
        with pytest.raises(InputError, match="max_new_tokens must be at least 1"):
            Wording(**settings)


def test_a_model_that_says_nothing_is_told(records, tmp_path, monkeypatch):
    monkeypatch.setattr(describe, "_asker", lambda *_: lambda image: " \n")
    with pytest.raises(InputError, match="m says nothing about"):
        describe_images(records, tmp_path / "out.jsonl", "m", SHORT, CPU)
    assert Path(tmp_path / "out.jsonl").read_text() == ""
