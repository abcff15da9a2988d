"""SAP's layers by score retention: the rule, the curve against loops over pairs, and layers named in a setting."""

import json
import math
import random
import statistics
from dataclasses import replace

import pytest
import torch
from test_attention import eager_signals
from transformers import ColPaliForRetrieval

from samer.compressors import make_compressor, settings_written
from samer.config import InputError, MergeConfig, load_config
from samer.data import flickr
from samer.features.read import FeatureStore
from samer.features.write import write_features
from samer.index.read import Index
from samer.index.write import build_index
from samer.retrievers.attention import NoSignals
from samer.retrievers.hf import Retriever
from samer.retrievers.retention import anchor_layers, retention_curve, score_retention


@pytest.fixture(scope="module")
def retriever(base):
    return Retriever.load(str(base))


@pytest.fixture(scope="module")
def eager(base):
    return ColPaliForRetrieval.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def records(world):
    return flickr.load_split(world, "val", boxes=False)[:3]


# --- the rule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "end", "window"), [(18, 15, (11, 14)), (28, 24, (18, 23)), (36, 34, (26, 33))]
)  # as the paper found for ColPali, ColQwen2 and Jina v4
def test_the_window_ends_where_the_curve_falls_for_good(layers, end, window):
    curve = [0.5 + 0.001 * k for k in range(layers)]  # half of it is below the median
    curve[end:] = [0.1] * (layers - end)
    assert anchor_layers(curve) == window


@pytest.mark.parametrize("seed", range(30))
def test_the_window_by_loops(seed):
    draw = random.Random(seed)
    curve = [draw.choice((0.2, 0.4, 0.6, 0.8)) for _ in range(draw.randint(1, 12))]
    median, count = statistics.median(curve), len(curve)
    starts = [start for start in range(count + 1) if all(value < median for value in curve[start:])]
    end = min(starts)  # the longest end that is below; the empty one always is
    assert anchor_layers(curve) == (max(0, end - math.ceil(count / 5)), end - 1)


# --- the curve ------------------------------------------------------------------------------------------------------


def naive_retention(query, patches, attention):
    """A layer at a time: the tenth with most attention, and sums of maxima over them and over all."""
    kept = sorted(range(len(patches)), key=lambda k: -float(attention[k]))[: max(1, round(len(patches) / 10))]
    after = sum(max(float(q @ patches[k]) for k in kept) for q in query)
    return after / sum(max(float(q @ v) for v in patches) for q in query)


@pytest.mark.parametrize("count", [1, 4, 26, 64])
def test_retention_by_loops(count):
    generator = torch.Generator().manual_seed(count)
    query, patches = torch.rand(5, 8, generator=generator), torch.rand(count, 8, generator=generator)
    attention = torch.rand(3, count, generator=generator)
    expected = [naive_retention(query, patches, layer) for layer in attention]
    assert score_retention(query, patches, attention).tolist() == pytest.approx(expected, abs=1e-5)
    assert score_retention(0 * query, patches, attention).tolist() == [1, 1, 1]


def test_the_curve_is_the_mean_over_pairs(retriever, eager, records):
    found = []
    for record in records:
        inputs = retriever.record_inputs([record])
        visual = retriever.encode_images(inputs)
        columns = [eager_signals(eager, inputs, visual.patches, [layer], 0)["middle_mean"][0] for layer in range(2)]
        own = visual.patches[0]
        for caption in record.captions:
            query = retriever.encode_queries(retriever.query_inputs([caption.text])).tokens[0]
            found.append([naive_retention(query, visual.tokens[0, own], layer[own]) for layer in columns])
    expected = torch.tensor(found).mean(0).tolist()
    assert retention_curve(retriever, records, batch_size=2) == pytest.approx(expected, abs=1e-4)
    assert abs(expected[0] - expected[1]) > 1e-3


def test_images_without_captions_are_refused(retriever):
    with pytest.raises(InputError, match="none of 0 images has a caption"):
        retention_curve(retriever, [])


def test_the_command_prints_the_curve_and_the_setting(base, world, script, records, retriever, capsys):
    """Seven pairs: five of the first image, two of the second; the last line is one that settings take."""
    words = ["--data-root", world, "--split", "val", "--pairs", 7, "--batch-size", 1, "--device", "cpu"]
    curve, layers = script("layers").main([str(word) for word in (*words, f"model.name={base}")])
    two = [records[0], replace(records[1], captions=records[1].captions[:2])]
    assert [len(record.captions) for record in two] == [5, 2]
    assert curve == pytest.approx(retention_curve(retriever, two), abs=1e-5)
    assert layers == anchor_layers(curve)
    told = capsys.readouterr().out.splitlines()
    head, *lines, setting = [line for line in told if not line.startswith("note: ")]
    assert head.endswith("score retention over 7 pairs of 2 images")
    assert [float(line.split()[2]) for line in lines] == pytest.approx(curve, abs=1e-4)
    assert [line.endswith("read") for line in lines] == [layers[0] <= layer <= layers[1] for layer in range(2)]
    assert load_config(None, [setting]).merge.sap_layers == f"{layers[0]}-{layers[1]}"


# --- the setting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "own"), [("1-1", [1]), ("0-1", [0, 1]), ("0-0", [0])])
def test_named_layers_are_read(retriever, eager, records, layers, own):
    inputs = retriever.record_inputs(records)
    names = [f"mean:{layers}", f"max:{layers}", "last"]
    visual = retriever.encode_images(inputs, names)
    expected = eager_signals(eager, inputs, visual.patches, own, 1)
    for name, wanted in zip(names, ("middle_mean", "middle_max", "last")):
        torch.testing.assert_close(visual.attention[name], expected[wanted], atol=1e-4, rtol=1e-4)
    for heads in ("mean", "max"):
        settings = MergeConfig(num_regions=9, compressor=f"sap-{heads}", sap_layers=layers)
        kept = make_compressor(settings)(visual)
        for row, patches in enumerate(visual.patches):
            salience = expected[f"middle_{heads}"][row].masked_fill(~patches, -1)
            assert set((kept.assignments[row] >= 0).nonzero()[:, 0].tolist()) == set(salience.topk(9).indices.tolist())


@pytest.mark.parametrize("written", ["11", "14-11", "a-b", "1-", "-1-2", "11..14"])
def test_what_names_no_layers_is_refused(written):
    with pytest.raises(InputError, match=r"merge\.sap_layers must be first and last layer, such as 11-14, or empty"):
        MergeConfig(sap_layers=written)


def test_layers_that_are_not_there_are_refused(retriever, records):
    inputs = retriever.record_inputs(records)
    with pytest.raises(InputError, match=r"merge\.sap_layers 1-2: the model has 2 layers, from 0 on"):
        retriever.encode_images(inputs, ["mean:1-2"])


def test_an_index_says_its_layers(retriever, world, tmp_path):
    merge = load_config(None, ["merge.compressor=sap-mean", "merge.sap_layers=0-0", "merge.num_regions=1/8"]).merge
    build_index(tmp_path / "index", world, ["val"], retriever, merge, limit_images=2)
    assert Index(tmp_path / "index").manifest.merge == merge
    middle = load_config(None, ["merge.compressor=sap-mean", "merge.num_regions=1/8"]).merge
    with pytest.raises(InputError, match="sap_layers"):
        build_index(tmp_path / "index", world, ["val"], retriever, middle, limit_images=2)


def test_files_without_the_setting_stay_as_they_were():
    for name in ("sap-mean", "samer"):
        assert "sap_layers" not in settings_written(MergeConfig(compressor=name))
    assert "sap_layers" not in settings_written(MergeConfig(sap_layers="1-2"))  # samer reads no attention
    written = settings_written(MergeConfig(compressor="sap-max", sap_layers="1-2"))
    assert MergeConfig(**json.loads(json.dumps(written))) == MergeConfig(compressor="sap-max", sap_layers="1-2")


def test_a_feature_store_holds_the_middle_layers_only(retriever, base, world, records, tmp_path):
    write_features(tmp_path, world, ["val"], retriever, dtype="float32", limit_images=3)
    store = FeatureStore(tmp_path, str(base), "cpu")
    with pytest.raises(NoSignals, match="a feature store holds no attention of layers mean:0-1; use the pictures"):
        store.encode_images(store.record_inputs(records), ["mean:0-1"])
