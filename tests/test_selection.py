"""Phrases, nonce words and CPI against loops; what is chosen; the file of chosen captions and who reads it."""

import json
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from samer.config import DataConfig, InputError
from samer.data import training_records
from samer.data.records import Caption, Phrase
from samer.features.read import FeatureStore
from samer.features.write import write_features
from samer.retrievers.base import Projector
from samer.selection import cpi
from samer.selection.choose import choose, write_chosen
from samer.selection.cpi import Scored, score_captions
from samer.selection.nonce import with_nonce
from samer.selection.phrases import Span, noun_chunks, phrases_of
from samer.training import align
from samer.training.align_settings import AlignConfig, AlignSettings


def said(caption):
    return [(span.type, caption.text[span.start : span.end]) for span in phrases_of(caption)]


def marked(text, *phrases, chain="1"):
    """A caption with these parts of it marked, each where it first stands."""
    spans = [(text.index(each), text.index(each) + len(each)) for each in phrases]
    return Caption(text, tuple(Phrase(text[a:b], chain, ("other",), a, b, ()) for a, b in spans), related=True)


# --- phrases --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (
            marked("A little girl in a pink dress is climbing up a set of stairs .", "A little girl", "a pink dress"),
            [
                *(("object", "girl"), ("object", "dress"), ("attribute", "little"), ("attribute", "pink")),
                *(("relation", "in"), ("relation", "climbing up a set of stairs")),
            ],
        ),
        (marked("Two dogs and a cat .", "Two dogs", "a cat"), [("object", "dogs"), ("object", "cat")]),
        (marked("A man waves .", "A man"), [("object", "man"), ("relation", "waves")]),
        (marked("They hug a dog .", "They", "a dog"), [("object", "dog"), ("relation", "hug")]),
        (marked("People hug each other .", "each other", chain="0"), []),  # nothing to be seen is marked
        (Caption("", (), related=True), []),
    ],
)
def test_marked_phrases_become_objects_attributes_and_relations(caption, expected):
    assert said(caption) == expected


@pytest.mark.parametrize(
    ("text", "chunks"),
    [
        ("A brown dog runs on the wet grass .", ["A brown dog", "the wet grass"]),
        ("two men wearing red hats, one sleeping", ["two men", "red hats", "one sleeping"]),
        ("a running dog chases his own tail", ["a running dog", "his own tail"]),
        ("Children in a swimming pool", ["Children", "a swimming pool"]),
        ("The man who is sitting", ["The man"]),
        ("a sports fan", ["a sports fan"]),
        ("he is there", []),
        ("", []),
    ],
)
def test_noun_chunks_of_the_rule(text, chunks):
    found = [text[start:end] for start, end in noun_chunks(text)]
    assert found == chunks


def test_captions_without_marks_are_taken_by_the_rule():
    assert said(Caption("A brown dog runs on the wet grass .", (), related=True)) == [
        *(
            ("object", "dog"),
            ("object", "grass"),
            ("attribute", "brown"),
            ("attribute", "wet"),
            ("relation", "runs on"),
        ),
    ]


# --- nonce words ----------------------------------------------------------------------------------------------------


def test_a_phrase_becomes_as_many_words_of_as_many_letters():
    text, span = "A Big spider-patterned shirt, no. 5 of it", Span("attribute", 2, 35)
    made = with_nonce(text, span, 0, 0, set())
    assert text[2:35] == "Big spider-patterned shirt, no. 5"
    assert re.fullmatch(r"A [A-Z][a-z]{2} [a-z]{16} [a-z]{5}, [a-z]{3}\. [a-z]{3} of it", made.replace("-", ""))
    assert made == with_nonce(text, span, 0, 0, set())
    others = {with_nonce(text, span, 1, 0, set()), with_nonce(text, span, 0, 1, set()), made}
    assert len(others) == 3
    vowels = set("aeiou")
    word = made.split()[3].strip(",")
    assert all((a in vowels) != (b in vowels) for a, b in pairwise(word))


def test_a_nonce_word_is_none_of_the_known_ones():
    text, span = "ox", Span("object", 0, 2)
    short = {with_nonce(text, span, number, 0, set()) for number in range(3000)}
    assert {len(word) for word in short} == {3}
    longer = {with_nonce(text, span, number, 0, short) for number in range(30)}
    assert not longer & short
    every = {a + b + c for a in "aeioubdfgklmnprtvz" for b in "aeioubdfgklmnprtvz" for c in "aeioubdfgklmnprtvz"}
    assert len(with_nonce(text, span, 0, 0, every)) == 4  # none of three letters is left


# --- scores ---------------------------------------------------------------------------------------------------------


def naive_cpi(retriever, record, caption, replacements, known):
    """Score, and by type the mean drop, a text at a time."""
    image = retriever.encode_images(retriever.record_inputs([record])).tokens[0]

    def score(text):
        query = retriever.encode_queries(retriever.query_inputs([text])).tokens[0]
        return float(sum((image @ token).max() for token in query) / len(query))

    own, drops = score(caption.text), {"object": [], "attribute": [], "relation": []}
    for span in phrases_of(caption):
        found = [score(with_nonce(caption.text, span, k, 5, known)) for k in range(replacements)]
        drops[span.type].append(own - sum(found) / replacements)
    return own, {name: sum(each) / len(each) if each else None for name, each in drops.items()}


@pytest.fixture(scope="module")
def records(world):
    found = training_records(DataConfig(root=str(world), limit_train_images=5), boxes=False)
    first = found[0]
    bare = Caption("and", (), related=True)
    unrelated = replace(first.captions[1], related=False)
    twice = (first.captions[0], first.captions[0], unrelated, bare)
    return [replace(first, captions=twice), *found[1:4], replace(found[4], captions=())]


HOW = {"replacements": 2, "seed": 5, "batch_size": 3}


def test_scores_and_influence_equal_loops(retriever, records, tmp_path, monkeypatch):
    monkeypatch.setattr(cpi, "PART", 2)
    scored = score_captions(retriever, retriever, records, tmp_path, **HOW)
    assert [(each.image_id, each.text) for each in scored[:2]] == [
        (records[0].image_id, records[0].captions[0].text),
        (records[0].image_id, "and"),
    ]
    captions = [(record, caption) for record in records[1:4] for caption in record.captions]
    captions = [(records[0], records[0].captions[0]), (records[0], records[0].captions[3]), *captions]
    known = {word for _, caption in captions for word in re.findall(r"[a-z]+|[0-9]+", caption.text.lower())}
    assert len(scored) == len(captions) == 17
    for found, (record, caption) in zip(scored, captions):
        score, drops = naive_cpi(retriever, record, caption, 2, known)
        assert (found.image_id, found.text) == (record.image_id, caption.text)
        assert found.score == pytest.approx(score, abs=1e-5)
        assert found.drops == {k: v if v is None else pytest.approx(v, abs=1e-5) for k, v in drops.items()}
        held = [drop for drop in drops.values() if drop is not None]
        assert found.cpi == (pytest.approx(sum(held) / len(held), abs=1e-5) if held else None)
    assert scored[1].cpi is None
    assert max(abs(each.cpi) for each in scored if each.cpi is not None) > 1e-3


def test_finished_parts_are_kept_and_others_are_made_anew(retriever, records, tmp_path, monkeypatch):
    monkeypatch.setattr(cpi, "PART", 2)
    work = cpi._scores
    made = []
    monkeypatch.setattr(cpi, "_scores", lambda *words: made.append(words[2][0].image_id) or work(*words))
    first = score_captions(retriever, retriever, records, tmp_path, **HOW)
    assert made == [records[0].image_id, records[2].image_id, records[4].image_id]
    made.clear()
    assert score_captions(retriever, retriever, records, tmp_path, **HOW) == first
    assert made == []
    (tmp_path / "part-00001.safetensors").write_bytes(b"half")
    assert score_captions(retriever, retriever, records, tmp_path, **HOW) == first
    assert made == [records[2].image_id]
    other = score_captions(retriever, retriever, records, tmp_path, **{**HOW, "seed": 6})
    assert len(made) == 4
    assert [each.score for each in other] == pytest.approx([each.score for each in first], abs=1e-5)
    assert [each.cpi for each in other] != [each.cpi for each in first]


def test_a_replaced_picture_is_scored_anew(retriever, records, tmp_path):
    copies = []
    for record in records[1:3]:
        copies.append(replace(record, image_path=tmp_path / record.image_path.name))
        copies[-1].image_path.write_bytes(record.image_path.read_bytes())
    first = score_captions(retriever, retriever, copies, tmp_path / "scores", **HOW)
    copies[0].image_path.write_bytes(copies[1].image_path.read_bytes())
    second = score_captions(retriever, retriever, copies, tmp_path / "scores", **HOW)
    changed = [a.score != pytest.approx(b.score, abs=1e-6) for a, b in zip(first, second)]
    assert changed == [True] * 5 + [False] * 5


def test_a_store_gives_the_images(retriever, records, world, base, tmp_path):
    write_features(tmp_path / "store", world, ["train"], retriever, dtype="float32")
    store = FeatureStore(tmp_path / "store", str(base))
    ours = score_captions(store, retriever, records, tmp_path / "a", **HOW)
    plain = score_captions(retriever, retriever, records, tmp_path / "b", **HOW)
    assert [each.score for each in ours] == pytest.approx([each.score for each in plain], abs=1e-5)
    store.use_projector(Projector(store.base_projector.weight * 2, store.base_projector.bias))
    with pytest.raises(InputError, match="project by different weights"):
        score_captions(store, retriever, records, tmp_path / "c", **HOW)


def test_what_can_not_be_scored_is_refused(retriever, records, tmp_path):
    with pytest.raises(InputError, match="replacements is 0"):
        score_captions(retriever, retriever, records, tmp_path, **{**HOW, "replacements": 0})
    with pytest.raises(InputError, match="none of 1 images has a caption"):
        score_captions(retriever, retriever, records[4:], tmp_path, **HOW)


# --- choices --------------------------------------------------------------------------------------------------------


def pool(*rows):
    """(score, drops of objects, of relations) each."""
    names = ("object", "attribute", "relation")
    return [Scored(f"i{k}", f"t{k}", score, dict(zip(names, (a, None, b)))) for k, (score, a, b) in enumerate(rows)]


ROWS = pool((0.9, 0.1, 0.1), (0.1, 0.9, 0.9), (0.5, 0.4, None), (0.6, 0.0, 0.6), (0.8, None, None), (0.2, 0.2, 0.2))


@pytest.mark.parametrize(
    ("rule", "share", "drop", "kept"),
    [
        ("cpi", 0.5, 0.0, "123"),
        ("cpi", 0.5, 0.2, "235"),  # t1 has the lowest score
        ("cpi", 0.8, 0.2, "02345"),  # t4 has no phrase: the last
        ("cpi", 0.67, 0.2, "0235"),
        ("alignment", 0.5, 0.2, "034"),
        ("cpi", 0.01, 0.0, "1"),
    ],
)
def test_what_a_rule_keeps(rule, share, drop, kept):
    assert "".join(each.text[1:] for each in choose(ROWS, rule, share=share, drop=drop)) == kept


def test_a_random_choice_is_that_of_its_seed():
    many = pool(*[(0.5, 0.1, 0.1)] * 200)
    first, again, other = ([e.text for e in choose(many, "random", share=0.5, seed=k)] for k in (1, 1, 2))
    assert first == again != other
    assert len(set(first)) == 100
    assert first == [each.text for each in many if each.text in set(first)]  # in their order
    assert 30 < len(set(first) & set(other)) < 70


@pytest.mark.parametrize(("rule", "share", "drop"), [("best", 0.5, 0.0), ("cpi", 0.0, 0.0), ("cpi", 0.6, 0.5)])
def test_choices_that_do_not_fit_are_refused(rule, share, drop):
    with pytest.raises(InputError, match=r"unknown|share"):
        choose(ROWS, rule, share=share, drop=drop)
    with pytest.raises(InputError, match="share nan"):
        choose(ROWS, "cpi", share=float("nan"))


# --- the file, and who reads it -------------------------------------------------------------------------------------


@pytest.fixture
def chosen(world, tmp_path):
    """A file with captions 1 and 3 of the second image and 0 of the fourth, and a row of another split's."""
    records = training_records(DataConfig(root=str(world)), boxes=False)
    kept = [(records[1], 1), (records[1], 3), (records[3], 0)]
    scored = [Scored(record.image_id, record.captions[k].text, 0.5, {}) for record, k in kept]
    write_chosen(tmp_path / "chosen.jsonl", [*scored, Scored("elsewhere", "a thing", 0.1, {})])
    return tmp_path / "chosen.jsonl"


def test_only_chosen_captions_are_read(world, chosen):
    every = training_records(DataConfig(root=str(world)), boxes=True)
    data = DataConfig(root=str(world), captions=str(chosen))
    assert training_records(data, boxes=True) == [
        replace(every[1], captions=(every[1].captions[1], every[1].captions[3])),
        replace(every[3], captions=every[3].captions[:1]),
    ]
    assert len(training_records(replace(data, limit_train_images=2), boxes=False)) == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not a JSON object"),
        ('{"image_id": "%s"}', "line 2: text must be text"),
        ('{"image_id": 7, "text": "x"}', "line 2: image_id must be text"),
        ('{"image_id": "%s", "text": "no such caption"}', "line 2: image .* has no caption 'no such caption'"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_its_line(world, tmp_path, line, words):
    first = training_records(DataConfig(root=str(world)), boxes=False)[0]
    good = json.dumps({"image_id": first.image_id, "text": first.captions[0].text})
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{good}\n{line.replace('%s', first.image_id)}\n", encoding="utf-8")
    with pytest.raises(InputError, match=f"bad.jsonl: {words}"):
        training_records(DataConfig(root=str(world), captions=str(path)), boxes=False)


def test_a_file_of_other_images_or_none_is_refused(world, tmp_path):
    write_chosen(tmp_path / "other.jsonl", ROWS)
    for name, words in (("other.jsonl", "no caption of these 12 images"), ("none.jsonl", "none.jsonl: can't be read")):
        with pytest.raises(InputError, match=words):
            training_records(DataConfig(root=str(world), captions=str(tmp_path / name)), boxes=False)


def test_training_and_banks_take_the_chosen_captions(base, world, chosen, tmp_path, script, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {{name: {base}}}\ntrain: {{bf16: false, num_train_epochs: 1, train_batch_size: 2}}\n")
    words = [f"data.root={world}", f"data.captions={chosen}", "data.eval_split=", "train.dataloader_num_workers=0"]
    script("train").main(["--config", str(config), *words, f"train.output_dir={tmp_path / 'run'}"])
    assert "on 3 captions of 2 images" in capsys.readouterr().out
    bank = ["--data-root", str(world), "--out", str(tmp_path / "bank.safetensors"), f"model.name={base}"]
    assert script("bank").main([*bank, f"data.captions={chosen}"]).origin.count == 3
    assert script("bank").main([*bank, f"data.captions={chosen}", "--split", "test"]).origin.count > 3


def test_an_alignment_takes_the_chosen_captions(world, chosen):
    data = DataConfig(root=str(world), captions=str(chosen), eval_split="")
    config = AlignConfig(data=data, align=AlignSettings(images_per_step=2))
    records, validation = align._records(config)
    assert [len(record.captions) for record in records] == [2, 1]
    assert validation == []


def test_the_script_scores_once_and_chooses_by_any_rule(base, world, tmp_path, script, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["--data-root", str(world), "--batch-size", "8", f"model.name={base}", "data.limit_train_images=4"]
    kept = script("select_captions").main([*words, "--out", str(tmp_path / "cpi.jsonl")])
    assert "10 of 20 captions" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "cpi.jsonl").read_text().splitlines()]
    assert [(row["image_id"], row["text"], row["cpi"]) for row in rows] == [(e.image_id, e.text, e.cpi) for e in kept]
    assert {"score", "object", "attribute", "relation"} <= rows[0].keys()
    parts = sorted((tmp_path / "cpi_scores").glob("part-*"))
    times = [part.stat().st_mtime_ns for part in parts]
    more = [*words, "--scores", str(tmp_path / "cpi_scores"), "--out", str(tmp_path / "other.jsonl")]
    aligned = script("select_captions").main([*more, "--by", "alignment", "--share", "0.25"])
    assert len(aligned) == 5
    assert [part.stat().st_mtime_ns for part in parts] == times
    data = DataConfig(root=str(world), captions=str(tmp_path / "other.jsonl"))
    assert sum(len(record.captions) for record in training_records(data, boxes=False)) == 5
