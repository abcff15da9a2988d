"""Retrievers whose vision tower is reduced: what they give, what stores and indexes record of it, what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_towers import save_text, save_vision
from test_towers import make, pictures

from samer.compressors import make_compressor
from samer.config import InputError, MergeConfig, ReduceConfig
from samer.data import make_reader
from samer.data.records import ImageRecord
from samer.features.read import FeatureStore, open_encoder
from samer.features.towers import StoredTowers
from samer.features.write import write_features
from samer.grounding import PhraseIndex, ground
from samer.index.manifest import read_index_manifest
from samer.index.read import Index
from samer.index.settings import Asked, encoder_of, settings_for
from samer.index.write import build_index
from samer.reducers.calibration import calibrate, read_statistics, with_statistics, write_statistics
from samer.reducers.running import Reduced, reduced
from samer.report.evaluate import evaluate_index
from samer.retrievers.attention import NoSignals
from samer.retrievers.hf import Retriever
from samer.retrievers.pretrained import read_tower_config
from samer.retrievers.towers import without_adapters
from samer.tokens import regions_of_patches, shared_by_patches

ADAMERGE = ReduceConfig("adamerge", r=14, mean=[0.05] * 5, deviation=[0.03] * 5)
TOME = ReduceConfig("tome", r=6)
MERGE = MergeConfig(num_regions=4)


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    place = tmp_path_factory.mktemp("towers")
    return str(make(place / "retriever", save_vision(place / "vision"), save_text(place / "text")))


@pytest.fixture
def pair(towers):
    return Retriever.load(towers)


def ragged(retriever, images, r):
    """AdaMerge with such statistics that these images lose different numbers of tokens in every block."""
    blocks = len(Reduced(retriever.tower, ReduceConfig()).blocks)
    settings = ReduceConfig("adamerge", r=r, mean=[float("inf")] * blocks, deviation=[1.0] * blocks)
    for block in range(blocks):  # from the first on, as each depends on those before it
        with torch.no_grad(), reduced(retriever.tower, settings) as run:
            retriever.family.see(retriever.image_inputs(images))
        found = run.tokens.similarity[block]
        mean, deviation = list(settings.mean), list(settings.deviation)
        mean[block], deviation[block] = float(found.mean()), float(found.std()) / 3
        settings = replace(settings, mean=mean, deviation=deviation)
    return settings


def reduce(retriever, settings):
    retriever.use_reduction(settings)
    return retriever


def mean_places(source, coords, count):
    return torch.stack([coords[source == n].mean(0) for n in range(count)])


@pytest.mark.parametrize(
    "settings", [TOME, "adamerge", ReduceConfig("cubist", r=2)], ids=["tome", "adamerge", "cubist"]
)
def test_a_tower_retriever_gives_what_its_adapter_makes_of_the_reduced_tower(pair, settings):
    images = pictures(3)
    settings = ragged(pair, images, 14) if settings == "adamerge" else settings
    inputs = pair.image_inputs(images)
    whole = pair.encode_images(inputs)
    model = pair.model
    with reduced(model.vision_tower, settings) as run:
        states = model.vision_tower(pixel_values=inputs["pixel_values"]).last_hidden_state[:, 1:]
    visual = reduce(pair, settings).encode_images(inputs)
    for row in range(3):
        count = int(run.tokens.number[row])
        alone = model.projection(model.vision_adapter(states[row : row + 1, :count]))[0]
        assert torch.allclose(visual.tokens[row, :count], torch.nn.functional.normalize(alone, dim=-1), atol=1e-5)
        assert torch.equal(visual.source[row], run.tokens.source[row])
        assert torch.allclose(visual.coords[row, :count], mean_places(visual.source[row], whole.coords[row], count))
        assert visual.patches[row].tolist() == [n < count for n in range(visual.tokens.shape[1])]
        assert visual.grid[row].tolist() == [8, 8]
        assert not visual.views[row].any()
        own = visual.mask is None or visual.mask[row].tolist() == visual.patches[row].tolist()
        assert own
        single = pair.encode_images(pair.image_inputs(images[row : row + 1]))
        assert torch.allclose(single.tokens[0], visual.tokens[row, :count], atol=1e-5)  # whatever it is batched with
    assert torch.equal(visual.layer_tokens, torch.stack(run.tokens.counts, 1))
    assert whole.layer_tokens is None
    assert (visual.mask is not None) == (settings.method == "adamerge")


def test_unmerged_or_with_nothing_to_merge_the_layout_stays(pair):
    inputs = pair.image_inputs(pictures())
    whole = pair.encode_images(inputs)
    same = reduce(pair, ReduceConfig("tome", r=0)).encode_images(inputs)
    assert torch.equal(same.tokens, whole.tokens)
    assert same.layer_tokens.tolist() == [[64] * 5] * 2
    full = reduce(pair, replace(TOME, unmerge=True)).encode_images(inputs)
    assert full.tokens.shape == whole.tokens.shape
    assert torch.equal(full.source, whole.source)
    assert torch.equal(full.coords, whole.coords)
    assert full.layer_tokens.tolist() == [[58, 52, 46, 40, 34]] * 2
    assert not torch.allclose(full.tokens, whole.tokens, atol=1e-3)


@pytest.mark.parametrize("settings", [ReduceConfig("tome", r=20), ReduceConfig("cubist", r=2)], ids=lambda e: e.method)
def test_colpali_with_fewer_placeholders_is_transformers_given_as_many(retriever, settings):
    """Its own forward pass, pictures and all, on inputs with fewer placeholders, the tower reduced underneath."""
    images = pictures(2, 64)
    inputs = retriever.image_inputs(images)
    ids, model = inputs["input_ids"], retriever.model
    left = {"tome": 44, "cubist": 36}[settings.method]
    rows = [[n for n, token in enumerate(row) if token != retriever.image_token_id] for row in ids.tolist()]
    firsts = [[n for n, token in enumerate(row) if token == retriever.image_token_id][:left] for row in ids.tolist()]
    kept = torch.tensor([sorted(a + b) for a, b in zip(rows, firsts)])
    short = {name: inputs[name].gather(1, kept) for name in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad(), reduced(model, settings):
        wanted = model(**short, pixel_values=inputs["pixel_values"], use_cache=False).embeddings
    visual = reduce(retriever, settings).encode_images(inputs)
    assert torch.allclose(visual.tokens, wanted, atol=1e-5)
    assert visual.tokens.shape[1] == ids.shape[1] - 64 + left
    assert visual.patches.sum(1).tolist() == [left] * 2
    assert visual.source.shape == (2, 64)
    assert visual.patches.gather(1, visual.source).all()
    assert visual.coords[~visual.patches].eq(0.5).all()
    assert visual.layer_tokens.tolist() == [[left]] * 2


def test_colpali_ragged_and_unmerged(retriever):
    images = pictures(3, 64)
    settings = ragged(retriever, images, 30)
    inputs = retriever.image_inputs(images)
    whole = retriever.encode_images(inputs)
    visual = reduce(retriever, settings).encode_images(inputs)
    counts = visual.patches.sum(1).tolist()
    assert len(set(counts)) > 1
    assert visual.mask is not None
    for row in range(3):
        alone = retriever.encode_images(retriever.image_inputs(images[row : row + 1]))
        assert alone.tokens.shape[1] == whole.tokens.shape[1] - 64 + counts[row]
        assert torch.allclose(visual.tokens[row][visual.mask[row]], alone.tokens[0], atol=1e-5)
    unmerged = replace(settings, unmerge=True)
    full = reduce(retriever, unmerged).encode_images(inputs)
    with torch.no_grad(), reduced(retriever.model, unmerged):
        wanted = retriever.model(**retriever.family.model_inputs(inputs)).embeddings
    assert torch.allclose(full.tokens, wanted, atol=1e-5)
    assert torch.equal(full.coords, whole.coords)
    same = reduce(retriever, ReduceConfig("cubist", r=0)).encode_images(inputs)
    assert torch.equal(same.tokens, whole.tokens)


def test_what_a_region_stands_on_is_all_patches_that_merged_into_it(pair, world):
    records = make_reader("", world).load_split(world, "test", boxes=True, limit_images=3)
    visual = reduce(pair, TOME).encode_images(pair.record_inputs(records))
    merged = make_compressor(MERGE)(visual)
    regions = regions_of_patches(merged.assignments, visual.source)
    evidence = shared_by_patches(merged.weights[..., 0], visual.source)
    assert regions.shape == evidence.shape == (3, 64)
    for token in range(34):
        mine = visual.source[0] == token
        assert regions[0][mine].unique().tolist() == [int(merged.assignments[0, token])]
        assert float(evidence[0][mine].sum()) == pytest.approx(float(merged.weights[0, token, 0]), abs=1e-5)
    captions = [caption.text for record in records for caption in record.captions]
    query = pair.encode_queries(pair.query_inputs(captions))
    index = PhraseIndex(records, [query])
    own = index.own_tokens([0, 1, 2], [each[mask] for each, mask in zip(query.tokens, query.mask)])
    found = ground(merged, own, index, visual)
    assert found["evidence"].shape[1:] == (64,)


def test_attention_signals_of_a_reduced_tower_are_none(pair, retriever):
    inputs = reduce(pair, TOME).reduced(pair.image_inputs(pictures()))
    with pytest.raises(NoSignals, match="leave reduce out"):
        pair.image_states(inputs, ["last"])
    few = reduce(retriever, ReduceConfig("tome", r=20))
    visual = few.encode_images(few.image_inputs(pictures(2, 64)), ["last"])  # the language model's are there
    assert bool((visual.attention["last"] > 0).eq(visual.patches).all())


def test_a_store_and_an_index_say_how_the_tower_was_reduced(pair, towers, world, tmp_path):
    for name, settings in (("plain", ReduceConfig()), ("few", ADAMERGE)):
        encoder = open_encoder(towers, "cpu", reduce=settings)
        write_features(tmp_path / name, world, ["val"], encoder, dtype="float32", batch_size=4)
        build_index(tmp_path / f"{name}_index", world, ["val"], encoder, MERGE, dtype="float32", assignments=True)
        stored = FeatureStore(tmp_path / name, towers)
        assert stored.reduction.method == settings.method
        again = tmp_path / f"{name}_again"
        build_index(again, world, ["val"], stored, MERGE, dtype="float32", assignments=True)
        one, other = Index(tmp_path / f"{name}_index"), Index(again)
        assert one.manifest.reduce == other.manifest.reduce == stored.reduction
        records = make_reader("", world).load_split(world, "val", boxes=False)
        tokens = [encoder.encode_images(encoder.record_inputs([record])) for record in records]
        held = stored.encode_images(stored.record_inputs(records))
        for row, visual in enumerate(tokens):
            count = visual.tokens.shape[1]
            assert torch.allclose(held.tokens[row, :count], visual.tokens[0], atol=1e-5)
            assert torch.equal(held.source[row], visual.source[0])
    plain, few = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("plain", "few"))
    assert "reduce" not in plain
    assert few["reduce"]["mean"] == [0.05] * 5
    plain, few = (json.loads((tmp_path / f"{n}_index" / "manifest.json").read_text()) for n in ("plain", "few"))
    assert "reduce" not in plain
    assert few["reduce"] == {k: list(v) if isinstance(v, tuple) else v for k, v in few["reduce"].items()}
    assert read_index_manifest(tmp_path / "few_index" / "manifest.json").reduce == ADAMERGE
    with pytest.raises(InputError, match=r"holds features with reduce="):
        write_features(tmp_path / "few", world, ["val"], Retriever.load(towers), dtype="float32", batch_size=4)
    with pytest.raises(InputError, match=r"reduce="):
        build_index(
            tmp_path / "few_index", world, ["val"], Retriever.load(towers), MERGE, dtype="float32", assignments=True
        )
    with pytest.raises(InputError, match=r"made with reduce\.method=adamerge, asked for is tome"):
        open_encoder(towers, "cpu", features=tmp_path / "few", reduce=TOME)
    assert open_encoder(towers, "cpu", features=tmp_path / "few", reduce=ADAMERGE).reduction == ADAMERGE


def test_an_index_goes_on_as_it_was_reduced_and_refuses_another_way(pair, towers, tmp_path):
    folder = tmp_path / "index"
    words = [f"model.name={towers}", "reduce.method=tome", "reduce.r=6", "merge.num_regions=4"]
    settings = settings_for(folder, Asked(overrides=words), "float32")
    encoder = settings.open("cpu")
    assert encoder.reduction == TOME
    path = tmp_path / "album"
    path.mkdir()
    for number, picture in enumerate(pictures(3)):
        picture.save(path / f"{number}.png")
    from samer.data.pictures import find_pictures
    from samer.index.sync import update_images

    how = {"batch_size": 2, "dtype": "float32", "assignments": True}
    update_images(folder, find_pictures(path), encoder, settings.config.merge, **how)
    later = settings_for(folder, Asked(), "float32")
    assert later.open("cpu").reduction == TOME
    assert settings_for(folder, Asked(overrides=words[1:3]), "float32").config.reduce == TOME
    for said in ("reduce.r=7", "reduce.layers=[1]", "reduce.unmerge=true"):
        with pytest.raises(InputError, match=f"{said.split('=')[0]}=.* it says itself how it was made"):
            settings_for(folder, Asked(overrides=["reduce.method=tome", "reduce.r=6", said]), "float32")
    with pytest.raises(InputError, match=r"reduce\.method=tome, now none"):
        settings_for(folder, Asked(overrides=["reduce.method=none"]), "float32")


def test_statistics_are_those_of_the_images_pass_by_pass(pair, tmp_path):
    """Pass 0 without merging: moments of the similarity that the tower's own block inputs have."""
    from naive_reducers import adamerge_similarity

    images = pictures(5)
    records = []
    for number, picture in enumerate(images):
        picture.save(tmp_path / f"{number}.png")
        records.append(ImageRecord(str(number), tmp_path / f"{number}.png", ()))
    settings = ReduceConfig("adamerge", r=12)
    found = calibrate(pair.tower, "small", settings, [records[:2], records[2:]], pair.see, passes=2)
    inputs = pair.record_inputs(records)
    with torch.no_grad():
        states = pair.tower(pixel_values=inputs["pixel_values"], output_hidden_states=True).hidden_states
    similar = [[adamerge_similarity(image[1:]) for image in block] for block in states[:5]]
    assert torch.allclose(torch.tensor(found.history[0]), torch.tensor(similar).mean(1), atol=1e-5)
    assert len(found.history) == 3
    assert found.history[2] == found.mean
    # the last pass merged by what the one before it found
    once = calibrate(pair.tower, "small", settings, [records[:2], records[2:]], pair.see, passes=1)
    assert once.history == found.history[:2]
    merging = replace(settings, mean=once.mean, deviation=once.deviation)
    with torch.no_grad(), reduced(pair.tower, merging) as run:
        pair.see(records)
    rows = torch.stack([run.tokens.similarity[n] for n in range(5)])
    assert torch.allclose(rows.mean(1), torch.tensor(found.mean), atol=1e-5)
    assert torch.allclose(rows.std(1, correction=0), torch.tensor(found.deviation), atol=1e-5)
    assert (found.images, found.patches, found.passes, found.r_max) == (5, 64, 2, 12)
    write_statistics(tmp_path / "s.json", found)
    assert read_statistics(tmp_path / "s.json") == found


def test_statistics_of_something_else_are_refused(pair, retriever, tmp_path):
    pictures(1)[0].save(tmp_path / "a.png")
    batch = [ImageRecord("a", tmp_path / "a.png", ())]
    settings = ReduceConfig("adamerge", r=12)
    path = tmp_path / "s.json"
    write_statistics(path, calibrate(pair.tower, "small", settings, [batch], pair.see, passes=1))
    asked = replace(settings, statistics=str(path))
    assert with_statistics(asked, pair.tower).mean
    pair.use_reduction(asked)
    assert pair.reduction.statistics == ""
    with pytest.raises(InputError, match="statistics of small, another tower"):
        retriever.use_reduction(asked)
    with pytest.raises(InputError, match=r"r_max 12, reduce\.r is 13"):
        with_statistics(replace(asked, r=13), pair.tower)
    with pytest.raises(InputError, match=r"reduce\.order=salient, now inverse"):
        with_statistics(replace(asked, order="inverse"), pair.tower)
    for text, said in (("{}", "no statistics of a tower"), ("[", "JSON"), ('{"x": 1}', "unknown key x")):
        path.write_text(text)
        with pytest.raises(InputError, match=said):
            pair.use_reduction(asked)
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        pair.use_reduction(asked)
    with pytest.raises(InputError, match="statistics are of adamerge, an r above 0"):
        calibrate(pair.tower, "small", TOME, [batch], pair.see)
    with pytest.raises(InputError, match="0 batches"):
        calibrate(pair.tower, "small", settings, [], pair.see)


def test_more_than_a_tower_can_lose_is_refused_when_it_is_asked_for(pair, towers):
    with pytest.raises(InputError, match=r"reduce\.r=20 merges 20 tokens a block; block 2 has 24"):
        open_encoder(towers, "cpu", reduce=ReduceConfig("tome", r=20))


def test_calibrate_cache_and_compare_from_the_command_line(towers, world, script, tmp_path, capsys):
    out = str(tmp_path / "statistics.json")
    words = [f"model.name={towers}", "reduce.r=20"]
    script("calibrate").main(["--data-root", str(world), "--out", out, "--batch-size", "4", *words])
    assert "12 images of train, 64 patches, r_max 20" in capsys.readouterr().out
    reduce_words = ["reduce.method=adamerge", *words, f"reduce.statistics={out}"]
    index = str(tmp_path / "index")
    script("cache").main(
        ["--data-root", str(world), "--cache-dir", index, "--splits", "val", "merge.num_regions=4", *reduce_words]
    )
    assert Index(index).manifest.reduce.mean == read_statistics(out).mean
    store = str(tmp_path / "store")
    script("features").main(["--data-root", str(world), "--out", store, "--splits", "val", *reduce_words])
    assert FeatureStore(store, towers).reduction == Index(index).manifest.reduce
    words = ["merge.num_regions=4", "reduce.method=tome", "reduce.r=6", words[0]]
    asked = ["--config", "configs/demo.yaml", "--sections", "untouched", "--methods", "none", "samer", "--split", "val"]
    where = ["--data-root", str(world), "--out", str(tmp_path / "compared")]
    results = script("compare").main([*where, *asked, *words])
    assert results["about"]["tokens_per_image"] == 34
    assert results["about"]["reduce"]["method"] == "tome"
    assert FeatureStore(tmp_path / "compared" / "features", towers).reduction == TOME


def test_training_from_pictures_needs_the_layout_before_the_tower(towers, world, script, tmp_path):
    words = ["--config", "configs/demo.yaml", f"data.root={world}", f"model.name={towers}"]
    words += [f"train.output_dir={tmp_path / 'out'}", "reduce.method=tome", "reduce.r=6"]
    with pytest.raises(InputError, match=r"train from features .* or with reduce\.unmerge=true"):
        script("train").main(words)


def test_a_report_shows_what_one_reduced_tower_gave(pair, towers, world, script, tmp_path):
    for name, settings in (("plain", ReduceConfig()), ("few", TOME)):
        encoder = open_encoder(towers, "cpu", reduce=settings)
        build_index(tmp_path / name, world, ["test"], encoder, MERGE, dtype="float32", assignments=True)
    assert encoder_of(Index(tmp_path / "few"), "cpu").reduction == TOME
    assert encoder_of(Index(tmp_path / "few"), "cpu", pictures=False).reduction == ReduceConfig()  # for queries alone
    words = ["--data-root", str(world), "--split", "test", "--out", str(tmp_path / "report.html")]
    both = ["--method", f"few={tmp_path / 'few'}", f"plain={tmp_path / 'plain'}"]
    with pytest.raises(InputError, match="its vision tower was reduced otherwise"):
        script("report").main([*words, *both])
    script("report").main([*words, *both[:2]])
    assert (tmp_path / "report.html").is_file()


def test_adapters_take_the_outputs_of_whole_towers(towers, world, tmp_path):
    bare = tmp_path / "bare"
    without_adapters(read_tower_config(Path(towers) / "config.json"), bare)
    for name, settings in (("whole", ReduceConfig()), ("few", TOME)):
        write_features(
            tmp_path / name, world, ["val"], open_encoder(str(bare), "cpu", reduce=settings), dtype="float32"
        )
    assert StoredTowers.open(Retriever.load(towers), tmp_path / "whole")
    with pytest.raises(InputError, match="outputs of a tower reduced by tome; adapters take those of the whole"):
        StoredTowers.open(Retriever.load(towers), tmp_path / "few")
    with pytest.raises(InputError, match="its towers have run already"):
        StoredTowers.open(open_encoder(towers, "cpu", reduce=TOME), tmp_path / "whole")


def test_eval_says_how_the_tower_was_reduced(towers, world, tmp_path):
    for settings in (ReduceConfig(), TOME):
        encoder = open_encoder(towers, "cpu", reduce=settings)
        place = tmp_path / settings.method
        build_index(place, world, ["val"], encoder, MERGE, dtype="float32", assignments=True)
        result, _ = evaluate_index(Index(place), "val", torch.device("cpu"))
        assert result["cache"].get("reduce", {}).get("r", 0) == settings.r
