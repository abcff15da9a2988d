"""ColQwen2 on a small random model of transformers' own classes: positions, grids, padding, limits, and every step.

Shape letters: B images, N tokens per image."""

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from every_step import saved
from oracle import naive_merge
from PIL import Image
from small_colqwen2 import SIDE, save_colqwen2
from transformers import ColQwen2ForRetrieval

from samer.compare.measure import measure
from samer.compressors import make_compressor
from samer.config import InputError, MergeConfig, load_config
from samer.data import flickr
from samer.evaluation import both_directions
from samer.features.read import FeatureStore
from samer.index.read import Index
from samer.retrievers.attention import ATTENTION
from samer.retrievers.colqwen2 import ColQwen2
from samer.retrievers.hf import Retriever, identify

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "samer_k64_colqwen2.yaml"
SIZES = [(120, 90), (200, 60), (60, 90), (84, 140)]  # of pictures
GRIDS = [(3, 4), (2, 7), (3, 2), (5, 3)]  # rows and columns of squares of 28 pixels
TEXTS = ["two red circles left of a dog", "a car"]


def pictures(sizes=SIZES):
    drawn = np.random.default_rng(3)
    small = [Image.fromarray(drawn.integers(0, 255, (7, 9, 3), dtype=np.uint8)) for _ in sizes]
    return [image.resize(size, Image.BICUBIC) for image, size in zip(small, sizes)]


@pytest.fixture(scope="module", params=["right", "left"])
def shared(request, tmp_path_factory):
    """One that pads on the right, and one that pads on the left; tests leave it as it was."""
    folder = tmp_path_factory.mktemp("colqwen2") / request.param
    return Retriever.load(str(save_colqwen2(folder, padding_side=request.param)))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_colqwen2(tmp_path_factory.mktemp("colqwen2") / "model")


def given_to_language_model(retriever, run):
    """The `position_ids` that the language model gets in each pass that `run` makes."""
    seen = []
    model = retriever.model.vlm.language_model
    hook = model.register_forward_pre_hook(lambda _, __, words: seen.append(words["position_ids"]), with_kwargs=True)
    try:
        with torch.no_grad():
            run()
    finally:
        hook.remove()
    return seen


def without_ours(retriever, inputs):
    """What the processor made of pictures, as transformers' own forward pass takes it."""
    found = {name: value for name, value in inputs.items() if name != "model_mask"}
    return {**found, "attention_mask": inputs["model_mask"]} if "model_mask" in inputs else found


def qwen2_vl(retriever, inputs):
    """The last hidden states of Qwen2-VL itself, which is told what it needs to work out positions."""
    inputs = without_ours(retriever, inputs)
    ids, grids = inputs["input_ids"], inputs["image_grid_thw"]
    flat = torch.cat([pixels[:count] for pixels, count in zip(inputs["pixel_values"], grids.prod(1).tolist())])
    inputs["mm_token_type_ids"] = (ids == retriever.image_token_id).int()
    return retriever.model.vlm(**{**inputs, "pixel_values": flat}, use_cache=False)[0]


def expected_positions(retriever, inputs):
    """Time, row and column of every token, one at a time; 0 at padding."""
    ids, mask = inputs["input_ids"], inputs["model_mask"]
    found = torch.zeros(3, *ids.shape, dtype=torch.long)
    for image in range(len(ids)):
        rows, columns = (int(side) // 2 for side in inputs["image_grid_thw"][image, 1:])
        following, patch = 0, 0
        for token in range(ids.shape[1]):
            if not mask[image, token]:
                continue
            if ids[image, token] == retriever.image_token_id:
                row, column = divmod(patch, columns)
                found[:, image, token] = torch.tensor([following, following + row, following + column])
                patch += 1
                if patch == rows * columns:
                    following += max(rows, columns)
            else:
                found[:, image, token] = following
                following += 1
    return found


# --- positions ------------------------------------------------------------------------------------------------------


def check_positions(retriever, inputs):
    (found,) = given_to_language_model(retriever, lambda: retriever.hidden_states(inputs))
    assert found is not None, "the language model counts tokens by itself"
    assert torch.equal(found, expected_positions(retriever, inputs))
    for image, (rows, columns) in enumerate(GRIDS):
        time, row, column = found[:, image, inputs["input_ids"][image] == retriever.image_token_id]
        assert row.view(rows, columns).sub(row.min()).equal(torch.arange(rows)[:, None].expand(rows, columns))
        assert column.view(rows, columns).sub(column.min()).equal(torch.arange(columns).expand(rows, columns))
        assert time.unique().tolist() == [int(row.min())] == [int(column.min())]
        assert not row.equal(column)


def test_the_language_model_gets_rows_and_columns(shared):
    check_positions(shared, shared.image_inputs(pictures()))


def test_without_the_repair_that_test_fails(shared, monkeypatch):
    """Once it does not, transformers has mended its forward pass, and the repair may go."""
    repaired = ColQwen2.model_inputs

    def off(family, inputs):
        return {name: value for name, value in repaired(family, inputs).items() if name != "position_ids"}

    inputs = shared.image_inputs(pictures())
    hidden = shared.hidden_states(inputs)
    monkeypatch.setattr(ColQwen2, "model_inputs", off)
    with pytest.raises(AssertionError, match="counts tokens by itself"):
        check_positions(shared, inputs)
    patches = inputs["attention_mask"].bool()
    lost = F.cosine_similarity(hidden[patches], shared.hidden_states(inputs)[patches], dim=-1)
    assert lost.min() < 0.99  # and it matters


def test_positions_are_those_that_transformers_works_out_itself(shared):
    """Qwen2-VL does, where it is told of grids and images; its retrieval class did until 5.0, and may do so again."""
    inputs = shared.image_inputs(pictures())
    (ours,) = given_to_language_model(shared, lambda: shared.hidden_states(inputs))
    (theirs,) = given_to_language_model(shared, lambda: qwen2_vl(shared, inputs))
    assert torch.equal(ours, theirs)
    stock = lambda: shared.model(**without_ours(shared, inputs), use_cache=False)
    shared.model.vlm.rope_deltas = None
    (found,) = given_to_language_model(shared, stock)
    assert found is None or torch.equal(found, ours)


def test_queries_are_as_transformers_encodes_them(shared):
    inputs = shared.query_inputs(TEXTS)
    given = {name: value for name, value in inputs.items() if name != "offsets"}
    shared.model.vlm.rope_deltas = None
    found, stock = [], []
    theirs = given_to_language_model(shared, lambda: stock.append(shared.model(**given, use_cache=False).embeddings))
    ours = given_to_language_model(shared, lambda: found.append(shared.encode_queries(inputs).tokens))
    assert ours == theirs == [None]
    valid = inputs["attention_mask"].bool()
    assert not valid.all()
    torch.testing.assert_close(found[0][valid], stock[0][valid], atol=1e-6, rtol=0)


@pytest.mark.parametrize("count", [1, 2, 3])  # images in the batch before; as many, and more, than texts
def test_what_an_earlier_batch_left_has_no_effect(shared, count, monkeypatch):
    batches = shared.image_inputs(pictures()), shared.query_inputs(TEXTS)

    def both():
        return [shared.hidden_states(inputs) for inputs in batches]

    shared.model.vlm.rope_deltas = None
    fresh, seen = both(), given_to_language_model(shared, both)
    stale = torch.arange(1000, 1000 + count)[:, None]
    shared.model.vlm.rope_deltas = stale
    for left in (stale, None):  # the second time, what the first one left
        shared.model.vlm.rope_deltas = stale if left is not None else shared.model.vlm.rope_deltas
        images, texts = given_to_language_model(shared, both)
        assert torch.equal(images, seen[0])
        assert texts is seen[1] is None
    shared.model.vlm.rope_deltas = stale
    assert all(map(torch.equal, both(), fresh))
    monkeypatch.setattr(ColQwen2, "model_inputs", super(ColQwen2, ColQwen2).model_inputs)  # nothing is reset
    shared.model.vlm.rope_deltas = stale
    if count < 3:
        (texts,) = given_to_language_model(shared, lambda: shared.hidden_states(batches[1]))
        assert texts.min() >= 1000
    else:
        with pytest.raises(RuntimeError):  # no number of texts fits the images before
            shared.hidden_states(batches[1])
    shared.model.vlm.rope_deltas = None


# --- tokens ---------------------------------------------------------------------------------------------------------


def test_tokens_are_qwen2_vls_at_the_patches_alone(shared):
    inputs = shared.image_inputs(pictures())
    visual = shared.encode_images(inputs)
    with torch.no_grad():
        expected = F.normalize(shared.model.embedding_proj_layer(qwen2_vl(shared, inputs)), dim=-1)
    patches = inputs["input_ids"] == shared.image_token_id
    assert torch.equal(visual.mask, patches)
    assert torch.equal(visual.patches, patches)
    assert inputs["model_mask"].sum(1).gt(patches.sum(1) + 8).all()  # a prompt before and behind them
    torch.testing.assert_close(visual.tokens[patches], expected[patches], atol=1e-5, rtol=0)
    assert visual.grid.tolist() == [list(grid) for grid in GRIDS]
    for image, (rows, columns) in enumerate(GRIDS):
        places = patches[image].nonzero().flatten()
        assert visual.source[image, : rows * columns].equal(places)
        assert (visual.source[image, rows * columns :] == -1).all()
        for number, place in enumerate(places):
            row, column = divmod(number, columns)
            expected_place = torch.tensor([column / (columns - 1), row / (rows - 1)])
            torch.testing.assert_close(visual.coords[image, place], expected_place, atol=1e-6, rtol=0)


def test_a_batch_is_padded_where_the_tokenizer_says(shared):
    seen = shared.image_inputs(pictures())["model_mask"].bool()
    side = shared.processor.tokenizer.padding_side
    assert seen[:, -1 if side == "left" else 0].all()
    assert not seen[:, 0 if side == "left" else -1].all()


def test_an_image_is_the_same_alone_and_in_a_ragged_batch(shared):
    images = pictures()
    together = shared.encode_images(shared.image_inputs(images), ATTENTION)
    for row, image in enumerate(images):
        alone = shared.encode_images(shared.image_inputs([image]), ATTENTION)
        own, mine = together.mask[row], alone.mask[0]
        torch.testing.assert_close(together.tokens[row][own], alone.tokens[0][mine], atol=1e-5, rtol=0)
        assert torch.equal(together.coords[row][own], alone.coords[0][mine])
        assert torch.equal(together.grid[row], alone.grid[0])
        for name in ATTENTION:
            ours, theirs = together.attention[name][row], alone.attention[name][0]
            torch.testing.assert_close(ours[own], theirs[mine], atol=1e-4, rtol=1e-4)
            assert (ours[~own] == 0).all()


def test_a_query_is_the_same_alone_and_in_a_batch(shared):
    inputs = shared.query_inputs(TEXTS)
    together = shared.encode_queries(inputs)
    for row, text in enumerate(TEXTS):
        alone = shared.encode_queries(shared.query_inputs([text]))
        own = together.mask[row]
        torch.testing.assert_close(together.tokens[row][own], alone.tokens[0], atol=1e-5, rtol=0)
        assert torch.equal(inputs["offsets"][row][own], alone.offsets[0])
        spans = [span for span in alone.offsets[0].tolist() if span[0] >= 0]
        covered = [character for span in spans for character in range(*span)]
        assert covered == list(range(len(text)))  # every character by one token
    augmented = shared.processor.tokenizer.pad_token_id
    assert (inputs["input_ids"][together.mask] == augmented).sum() == 2 * 10  # they count, padding does not


def test_merges_are_those_of_plain_loops(shared):
    merge = MergeConfig(num_regions=5, center_init="farthest")
    visual = shared.encode_images(shared.image_inputs(pictures()))
    merged = make_compressor(merge)(visual)
    for row in range(len(GRIDS)):
        own = visual.mask[row]
        tokens, coords, _, assignments = naive_merge(visual.tokens[row][own], visual.coords[row][own], merge)
        torch.testing.assert_close(merged.tokens[row], tokens, atol=1e-5, rtol=0)
        torch.testing.assert_close(merged.coords[row], coords, atol=1e-5, rtol=0)
        assert torch.equal(merged.assignments[row][own], assignments)
        assert (merged.assignments[row][~own] == -1).all()


def test_signals_are_those_of_eager_attention(shared):
    inputs = shared.image_inputs(pictures())
    eager = ColQwen2ForRetrieval.from_pretrained(shared.name, attn_implementation="eager").eval()
    position_ids = expected_positions(shared, inputs)
    with torch.no_grad():
        given = without_ours(shared, inputs)
        attentions = eager(**given, position_ids=position_ids, output_attentions=True, use_cache=False).attentions
    assert len(attentions) == 5
    patches = inputs["attention_mask"].bool()
    columns = torch.zeros(5, *patches.shape, 2)
    for layer, attention in enumerate(attentions):
        for image in range(len(patches)):
            own = patches[image].nonzero().flatten()
            for head in range(2):
                columns[layer, image, own, head] = attention[image, head][own][:, own].sum(0)
    expected = {
        "middle_mean": (columns[2].mean(-1) + columns[3].mean(-1)) / 2,  # floor(0.4 L)..floor(0.6 L) of L = 5
        "middle_max": (columns[2].amax(-1) + columns[3].amax(-1)) / 2,
        "last": columns[4].mean(-1),
    }
    hidden, signals = shared.image_states(inputs, ATTENTION)
    assert torch.equal(hidden, shared.hidden_states(inputs))
    for name in ATTENTION:
        torch.testing.assert_close(signals[name], expected[name], atol=1e-4, rtol=1e-4)
    assert (signals["last"] - signals["middle_mean"]).abs().max() > 0.05
    del inputs["image_grid_thw"]
    with pytest.raises(InputError, match="image_grid_thw"):
        shared.image_states(inputs, ["last"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_positions_whole(base, dtype):
    retriever, exact = Retriever.load(str(base), dtype=dtype), Retriever.load(str(base))
    inputs = retriever.image_inputs(pictures())
    check_positions(retriever, inputs)
    patches = inputs["attention_mask"].bool()
    half, whole = (each.encode_images(inputs).tokens[patches] for each in (retriever, exact))
    assert retriever.hidden_states(inputs).dtype == dtype
    assert (half * whole).sum(-1).mean() > 0.98


# --- the processor's limits -----------------------------------------------------------------------------------------


def limited(base, folder, **size):
    """The model with other limits in its processor's file."""
    folder = shutil.copytree(base, folder)
    file = folder / "processor_config.json"
    found = json.loads(file.read_text())
    found["image_processor"]["size"] |= size
    file.write_text(json.dumps(found))
    return Retriever.load(str(folder))


def test_pictures_have_768_tokens_at_most_whatever_the_released_file_allows(base, tmp_path):
    released = limited(base, tmp_path / "released", longest_edge=12_845_056)
    assert dict(released.processor.image_processor.size) == {"shortest_edge": 3136, "longest_edge": 768 * 28 * 28}
    for size in ((2480, 3508), (4000, 500)):
        layout = released.image_layout(released.image_inputs(pictures([size])))
        rows, columns = layout.grid[0].tolist()
        assert 700 < rows * columns <= 768
        assert rows / columns == pytest.approx(size[1] / size[0], rel=0.12)
    own = limited(base, tmp_path / "own", longest_edge=10 * SIDE**2, shortest_edge=6 * SIDE**2)
    counts = own.image_inputs(pictures([*SIZES, (30, 30)]))["attention_mask"].sum(1).tolist()
    assert max(counts[:-1]) <= 10  # a lower limit stands
    assert counts[-1] >= 6


def test_a_checkpoint_of_older_files_is_limited_as_well(base, tmp_path):
    """Files as released: a picture processor of its own file and earlier name, which says its pixels in other words."""
    folder = shutil.copytree(base, tmp_path / "older")
    found = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "ColQwen2Processor"}))
    pixels = {"min_pixels": 3136, "max_pixels": 12_845_056}
    older = {**found["image_processor"], "image_processor_type": "Qwen2VLImageProcessor", "size": pixels, **pixels}
    (folder / "preprocessor_config.json").write_text(json.dumps(older))
    retriever = Retriever.load(str(folder))
    limits = dict(retriever.processor.image_processor.size)
    assert (limits["shortest_edge"], limits["longest_edge"]) == (3136, 768 * 28 * 28)
    assert retriever.processor.image_processor.backend == "pil"
    inputs, ours = (each.image_inputs(pictures()) for each in (retriever, Retriever.load(str(base))))
    assert torch.equal(inputs["input_ids"], ours["input_ids"])
    assert torch.equal(inputs["pixel_values"], ours["pixel_values"])


def test_the_limit_is_part_of_the_identity(base, monkeypatch):
    before = Retriever.load(str(base)).identity
    assert before.architecture == "ColQwen2ForRetrieval"
    monkeypatch.setattr(ColQwen2, "settings", {**ColQwen2.settings, "most_tokens": 1024})
    assert identify(str(base)).difference(before) == "processor"


def test_a_folder_is_indexed_but_for_what_the_model_refuses(base, script, tmp_path, capsys):
    saved(tmp_path / "album", pictures([(90, 60), (2, 500), (60, 90), (60, 60)]))
    words = ["--images", tmp_path / "album", "--cache-dir", tmp_path / "c", "--device", "cpu", f"model.name={base}"]
    assert script("index").main([str(word) for word in (*words, "merge.num_regions=4")]).images == 3
    told = capsys.readouterr().out
    assert "skipped, refused by the model: 1: 1.png; " in told
    assert "album/1.png: it is 2 x 500 pixels; one side may be 200 times the other, cut it in parts" in told


def test_what_the_processor_does_not_take_is_refused_by_name(shared, tmp_path):
    with pytest.raises(InputError, match=r"picture 1 of the batch is 2010 x 10 pixels"):
        shared.image_inputs(pictures([(90, 60), (2010, 10)]))
    with pytest.raises(InputError, match=r"1\.png: it is 2010 x 10 pixels; one side may be 200 times the other"):
        shared.record_inputs(saved(tmp_path / "lengthy", pictures([(90, 60), (2010, 10)])))
    assert shared.image_inputs(pictures([(2000, 10)]))["attention_mask"].sum() >= 4
    with pytest.raises(InputError, match=r"<\|image_pad\|>, which stands for an image"):
        shared.query_inputs(["a dog", "an <|image_pad|> of a dog"])
    inputs = shared.image_inputs(pictures())
    inputs["image_grid_thw"][1] = torch.tensor([1, 4, 6])
    with pytest.raises(InputError, match=r"image 1 of the batch has 14 image tokens, expected 6 \(2 x 3\)"):
        shared.image_layout(inputs)


# --- every step -----------------------------------------------------------------------------------------------------


def test_the_published_recipe():
    config = load_config(CONFIG, [])
    assert config.model.name == "vidore/colqwen2-v1.0-hf"
    assert config.merge == MergeConfig(num_regions=64)
    made = config.train
    assert (made.train_batch_size, made.grad_accum_steps) == (16, 4)
    assert (made.learning_rate, made.weight_decay, made.warmup_ratio) == (1e-4, 0.01, 0.05)
    assert (made.num_train_epochs, made.temperature, made.bf16) == (3, 0.07, True)
    assert made.output_dir == f"checkpoints/{made.run_name}" == "checkpoints/samer_k64_colqwen2"


@pytest.fixture(scope="module")
def stretched(world, tmp_path_factory):
    """The world with its pictures in four shapes, and their boxes with them."""
    folder = shutil.copytree(world, tmp_path_factory.mktemp("stretched") / "world")
    for number, file in enumerate(sorted((folder / "images" / "Images").glob("*.jpg"))):
        size = SIZES[number % len(SIZES)]
        with Image.open(file) as picture:
            before, other = picture.size, picture.resize(size)
        other.save(file)
        (annotated,) = folder.rglob(f"Annotations/{file.stem}.xml")
        tree = ElementTree.parse(annotated)
        for axis, (side, now) in zip("xy", zip(before, size)):
            tree.find("size/width" if axis == "x" else "size/height").text = str(now)
            for name in (f"{axis}min", f"{axis}max"):
                for corner in tree.iter(name):
                    corner.text = str(max(1, round(int(corner.text) * now / side)))
        tree.write(annotated)
    return folder


def words(base, world, folder, **changes):
    values = {
        "model__name": base,
        "data__root": world,
        "merge__num_regions": 5,
        "train__output_dir": folder,
        "train__bf16": "false",
        "train__train_batch_size": 8,
        "train__grad_accum_steps": 1,
        "train__num_train_epochs": 3,
        "train__learning_rate": 1e-2,
        "train__dataloader_num_workers": 0,
        "train__logging_steps": 1,
        "data__eval_split": "val",
        **changes,
    }
    return [f"{key.replace('__', '.')}={value}" for key, value in values.items()]


def brute_scores(retriever, records, merge):
    """Every caption against every image, one at a time, from merges written as plain loops."""
    images = []
    for record in records:
        visual = retriever.encode_images(retriever.record_inputs([record]))
        own = visual.mask[0]
        images.append(naive_merge(visual.tokens[0][own], visual.coords[0][own], merge)[0])
    rows = []
    for record in records:
        for caption in record.captions:
            query = retriever.encode_queries(retriever.query_inputs([caption.text])).tokens[0]
            rows.append([sum(max(float(token @ vector) for vector in image) for token in query) for image in images])
    return torch.tensor(rows) / torch.tensor([[len(q)] for q in _queries(retriever, records)])


def _queries(retriever, records):
    texts = [caption.text for record in records for caption in record.captions]
    return [retriever.query_inputs([text])["input_ids"][0] for text in texts]


def losses(folder):
    return [entry["loss"] for entry in json.loads((folder / "history.json").read_text()) if "loss" in entry]


def test_it_trains_is_indexed_and_is_searched_from_pixels_and_from_a_store(base, stretched, script, tmp_path, capsys):
    store = tmp_path / "store"
    made = ["--data-root", stretched, "--out", store, "--splits", "train", "val", "test", "--dtype", "float32"]
    script("features").main([str(word) for word in (*made, "--batch-size", 4, f"model.name={base}")])
    for name, more in (("pixels", {}), ("stored", {"data__features": store})):
        script("train").main(["--config", str(CONFIG), *words(base, stretched, tmp_path / name, **more)])
    curves = [torch.tensor(losses(tmp_path / name)) for name in ("pixels", "stored")]
    torch.testing.assert_close(*curves, atol=1e-4, rtol=0)
    assert len(curves[0]) == 3 * 8  # 60 captions of 12 images in batches of 8, three times
    assert curves[0][-8:].mean() < 0.95 * curves[0][:8].mean()

    retriever = Retriever.load(str(base))
    records = flickr.load_split(stretched, "test", boxes=False)
    stored = FeatureStore(store, str(base))
    ours, theirs = (each.encode_images(each.record_inputs(records), ATTENTION) for each in (stored, retriever))
    assert ours.grid.tolist() == theirs.grid.tolist()
    assert len(set(map(tuple, ours.grid.tolist()))) == 4
    assert ours.tokens.shape[1] == int(ours.grid.prod(1).max())  # patches alone are kept
    for row in range(len(records)):
        mine, other = ours.mask[row], theirs.mask[row]
        torch.testing.assert_close(ours.tokens[row][mine], theirs.tokens[row][other], atol=1e-5, rtol=0)
        for signal in ATTENTION:
            expected = theirs.attention[signal][row][other]
            torch.testing.assert_close(ours.attention[signal][row][mine], expected, atol=1e-4, rtol=1e-4)

    folder = ["--data-root", stretched, "--adapter-path", tmp_path / "pixels", "--splits", "test"]
    for name, more in (("pixels", []), ("stored", ["--features", store])):
        made = [
            *folder,
            "--cache-dir",
            tmp_path / f"{name}.index",
            *more,
            "--cache-dtype",
            "float32",
            "--batch-size",
            3,
        ]
        script("cache").main([str(word) for word in made])
    pixels, stored = (Index(tmp_path / f"{name}.index").scores("test") for name in ("pixels", "stored"))
    torch.testing.assert_close(pixels[0], stored[0], atol=1e-5, rtol=0)
    retriever.use_projector(Index(tmp_path / "pixels.index").projector())
    manifests = [Index(tmp_path / f"{name}.index").manifest for name in ("pixels", "stored")]
    merge = manifests[0].merge
    assert merge.num_regions == 5
    assert manifests[0].processing == {
        "backend": "pil",
        "most_tokens": "768",
        "picture_size": "shortest_edge 3136, longest_edge 18816",
        "padding_side": "right",
        "visual_prompt_prefix": retriever.processor.visual_prompt_prefix,
        "query_prefix": "Query: ",
    }
    assert manifests[1].processing == manifests[0].processing
    expected = brute_scores(retriever, records, merge)
    torch.testing.assert_close(pixels[0], expected, atol=1e-5, rtol=0)
    metrics = both_directions(*pixels)["text_to_image"]
    hits = (expected > expected.gather(1, pixels[1][:, None])).sum(1) == 0
    assert metrics["r@1"]["value"] == pytest.approx(100 * float(hits.double().mean()))
    about = ["--cache-dir", str(tmp_path / "pixels.index")]
    evaluated = [*about, "--output-json", str(tmp_path / "metrics.json"), "--data-root", str(stretched)]
    found = script("eval").main(evaluated)
    assert found["text_to_image"]["r@1"]["value"] == pytest.approx(metrics["r@1"]["value"])
    report = (tmp_path / "metrics.html").read_text()
    assert report.count("and the boxes of the phrase<") >= 4  # grounding, drawn
    capsys.readouterr()
    best = expected[0].topk(3)
    script("search").main([*about, "--json", "--top", "3", records[0].captions[0].text])
    rows = json.loads(capsys.readouterr().out)["results"]
    assert [row["id"] for row in rows] == [records[place].image_id for place in best.indices.tolist()]
    assert [row["score"] for row in rows] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize(("compressor", "signal"), [("sap-mean", "middle_mean"), ("sap-max", "middle_max")])
def test_sap_keeps_what_is_looked_at_and_osr_is_its_share_of_the_scores(base, stretched, compressor, signal):
    retriever = Retriever.load(str(base))
    records = flickr.load_split(stretched, "test", boxes=True)
    merge = MergeConfig(compressor=compressor, num_regions=4)
    measured = measure(retriever, records, {"sap": merge}, batch_size=3)["sap"]
    expected = []
    for record in records:
        visual = retriever.encode_images(retriever.record_inputs([record]), ATTENTION)
        own = visual.mask[0].nonzero().flatten()
        best = own[visual.attention[signal][0][own].argsort(descending=True)[:4]].tolist()
        for caption in record.captions:
            query = retriever.encode_queries(retriever.query_inputs([caption.text])).tokens[0]
            similar = (query @ visual.tokens[0].T).tolist()
            kept, every = (sum(max(row[place] for place in places) for row in similar) for places in (best, own))
            expected.append(kept / every)
    torch.testing.assert_close(measured["osr"], torch.tensor(expected), atol=1e-4, rtol=0)
    assert measured["osr"].max() <= 1 + 1e-5
    assert measured["osr"].min() < 0.999
    assert set(measured["vectors"].tolist()) == {4}
    assert torch.isfinite(measured["box_mass"]).all()
