"""samer.st: SaMer inside sentence-transformers gives our own scores, and says so where it can't."""

import importlib.util
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from small_colqwen2 import save_colqwen2
from small_modernvbert import save_modernvbert

from samer import InputError, MergeConfig
from samer.compressors import make_compressor
from samer.coords import visual_coords
from samer.retrievers.base import Projector
from samer.retrievers.hf import Retriever
from samer.scoring import maxsim
from samer.tokens import VisualTokens

sentence_transformers = pytest.importorskip("sentence_transformers", "6.2", reason="needs sentence-transformers 6.2")
st = pytest.importorskip("samer.st")
families = pytest.importorskip("samer.st.families")
modules = pytest.importorskip("sentence_transformers.multi_vector_encoder.modules")

TEXTS = ["two dogs", "a long query about nothing at all", "red"]
MERGE = MergeConfig(num_regions=5, center_init="farthest")
needs_torchvision = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision")
FAMILIES = [
    "colpali",
    "modernvbert",
    pytest.param("colqwen2", marks=needs_torchvision),
    pytest.param("neomme", marks=needs_torchvision),
]


@pytest.fixture(scope="module")
def images():
    draw = np.random.default_rng(0)
    sizes = [(60, 90), (200, 120), (64, 64), (50, 180)]
    return [Image.fromarray(draw.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, base):
    """A small model of a family by name, made when it is asked for."""
    made = {"colpali": base}

    def folder(name):
        if name not in made:
            place = tmp_path_factory.mktemp("models") / name
            if name == "neomme":
                from small_neomme import save_neomme

                made[name] = save_neomme(place)
            else:
                made[name] = (save_colqwen2 if name == "colqwen2" else save_modernvbert)(place)
        return str(made[name])

    return folder


def trained(folder):
    """A retriever with another projector than its own."""
    retriever = Retriever.load(folder)
    torch.manual_seed(5)
    given = retriever.base_projector
    bias = None if given.bias is None else torch.randn(given.bias.shape)
    retriever.use_projector(Projector(torch.randn(given.weight.shape), bias))
    return retriever


@torch.no_grad()
def our_scores(retriever, images, merge):
    """(Q, I) by our own encoder and compressor, without sentence-transformers."""
    queries = retriever.encode_queries(retriever.query_inputs(TEXTS))
    merged = make_compressor(merge)(retriever.encode_images(retriever.image_inputs(images)))
    return maxsim(queries.tokens, merged.tokens, queries.mask, merged.mask)


def their_scores(model, images, **options):
    """(Q, I), means over a query's tokens whatever the model says."""
    queries, documents = model.encode_query(TEXTS), model.encode_document(images, **options)
    return model.similarity(queries, documents, length_normalize=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, folders):
    """A retriever with a projector of its own by family, and the pipeline that was written of it."""
    made = {}

    def pair(name):
        if name not in made:
            retriever = trained(folders(name))
            folder = tmp_path_factory.mktemp("pipelines") / name
            st.save(folder, retriever, MERGE)
            made[name] = retriever, folder
        return made[name]

    return pair


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_pipeline_gives_our_scores(name, saved, images):
    retriever, folder = saved(name)
    model = st.load(folder, device="cpu")
    expected = our_scores(retriever, images, MERGE)
    assert (their_scores(model, images) - expected).abs().max() < 1e-4
    assert (model.similarity(model.encode_query(TEXTS), model.encode_document(images)) - expected).abs().max() < 1e-4
    assert expected.std() > 1e-3  # the model tells these pictures apart
    assert (their_scores(model, images, batch_size=1) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stock_pipeline_needs_no_code_of_ours(name, saved, images):
    retriever, folder = saved(name)
    kinds = [row["type"] for row in json.loads((folder / "modules.json").read_text())]
    assert all(kind.startswith("sentence_transformers.") for kind in kinds)
    assert len(kinds) == 4
    model = sentence_transformers.MultiVectorEncoder(str(folder), device="cpu")
    # torchvision scales pictures otherwise than Pillow; a ColQwen2's pipeline can't ask for Pillow's
    most = 2e-3 if name == "colqwen2" else 1e-4
    expected = our_scores(retriever, images, MergeConfig(compressor="none"))
    assert (model.similarity(model.encode_query(TEXTS), model.encode_document(images)) - expected).abs().max() < most
    layer = next(module for module in model if type(module).__name__ == "Dense").linear
    assert torch.equal(layer.weight, retriever.current_projector().weight)


@pytest.mark.parametrize("name", ["colpali", "colqwen2"])
def test_a_model_of_transformers_gives_our_scores(name, folders, images):
    expected = our_scores(Retriever.load(folders(name)), images, MERGE)
    options = {"device": "cpu", "model_kwargs": {"dtype": torch.float32}}
    model = st.load(folders(name), st.SamerPooling(5, center_init="farthest"), **options)
    assert (their_scores(model, images) - expected).abs().max() < 1e-4
    assert (their_scores(model, images, batch_size=3) - expected).abs().max() < 1e-4
    options["processor_kwargs"] = {"backend": "pil"}  # where torchvision is installed, transformers would take that
    again = sentence_transformers.MultiVectorEncoder(folders(name), **options)
    st.attach(again, st.SamerPooling(compressor="none"))
    whole = our_scores(Retriever.load(folders(name)), images, MergeConfig(compressor="none"))
    assert (their_scores(again, images) - whole).abs().max() < 1e-4


def test_colqwen2_is_repaired_in_the_model_that_needs_it(folders, images):
    options = {"device": "cpu", "model_kwargs": {"dtype": torch.float32}}
    plain = sentence_transformers.MultiVectorEncoder(folders("colqwen2"), **options)
    seen = []
    hear = lambda _, arguments, keywords: seen.append(keywords.get("position_ids"))
    plain[0].model.vlm.language_model.register_forward_pre_hook(hear, with_kwargs=True)
    plain.encode_document(images[:1])
    lost = seen.pop()
    assert lost is None or torch.equal(lost[-1], lost[-2])  # rows and columns alike: the defect of transformers
    st.attach(plain, st.SamerPooling(5))
    plain.encode_document(images[:1])
    time, rows, columns = seen.pop()[-3:]
    assert not torch.equal(rows, columns)
    assert not torch.equal(time, rows)
    assert st.repair(plain).architecture == "ColQwen2ForRetrieval"  # asked again: one hook is enough
    assert sum(isinstance(hook, families.Positions) for hook in plain[0]._forward_pre_hooks.values()) == 1


def test_vectors_alone_merge_by_their_grid(folders, images):
    model = sentence_transformers.MultiVectorEncoder(folders("colpali"), device="cpu")
    whole = model.encode_document(images)
    behind = st.attach(
        sentence_transformers.MultiVectorEncoder(folders("colpali"), device="cpu"), st.SamerPooling(5)
    ).encode_document(images)
    pooling = st.SamerPooling(5, grid=(8, 8))
    for found in (model.encode_document(images, token_pooling=pooling), pooling.pool(whole)):
        assert [row.shape for row in found] == [(5, 16)] * 4
        assert all((a - b).abs().max() < 2e-3 for a, b in zip(found, behind))  # float16 in between
    padded = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)
    again = pooling.pool(padded, attention_mask=torch.ones(padded.shape[:2]))
    assert torch.equal(again, torch.stack(pooling.pool(whole)))
    assert torch.equal(pooling.pool_one(whole[2]), again[2])


def test_grids_differ_from_image_to_image_and_batches_do_not_matter():
    torch.manual_seed(0)
    grids = [(3, 4), (2, 5), (6, 6)] * 30  # more than are merged at once
    rows = [torch.nn.functional.normalize(torch.randn(r * c + 2, 8), dim=-1) for r, c in grids]
    pooling = st.SamerPooling(4)
    found = pooling.pool(rows, grid=grids)
    for vectors, grid, ours in list(zip(rows, grids, found))[60:66]:
        coords = visual_coords(*grid, prompt_tokens=2)
        expected = make_compressor(MergeConfig(num_regions=4))(VisualTokens(vectors[None], coords))
        assert (ours - expected.tokens[0]).abs().max() < 1e-5
    share = st.SamerPooling("1/4").pool(rows[:3], grid=grids[:3])
    assert [len(each) for each in share] == [4, 3, 10]


def test_without_a_grid_places_do_not_count_and_that_is_said():
    torch.manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(12, 8), dim=-1)
    with pytest.warns(UserWarning, match="direction alone"):
        found = st.SamerPooling(3).pool_one(vectors)
    blind = MergeConfig(num_regions=3, spatial_weight=0.0)
    expected = make_compressor(blind)(VisualTokens(vectors[None], visual_coords(3, 4))).tokens[0]
    assert (found - expected).abs().max() < 1e-5
    with_places = st.SamerPooling(3, spatial_weight=5.0).pool_one(vectors, grid=(3, 4))
    assert (with_places - expected).abs().max() > 1e-2


def test_a_document_of_words_merges_by_direction(folders):
    model = st.attach(sentence_transformers.MultiVectorEncoder(folders("colpali"), device="cpu"), st.SamerPooling(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.encode_document([TEXTS[1], TEXTS[0]])
    assert [len(row) for row in found] == [4, 4]
    assert [len(row) for row in model.encode_query(TEXTS[:2])] != [4, 4]  # queries stay whole
    pictures_only = sentence_transformers.MultiVectorEncoder(folders("colqwen2"), device="cpu")
    st.attach(pictures_only, st.SamerPooling(4))
    with pytest.raises(InputError, match=r"document 0 of the batch has no vector: .* pictures alone"):
        pictures_only.encode_document(TEXTS)


def test_our_h_pool_and_theirs_are_different_things():
    torch.manual_seed(1)
    vectors = torch.nn.functional.normalize(torch.randn(40, 8), dim=-1)
    ours = st.SamerPooling(10, compressor="hpool").pool_one(vectors, grid=(5, 8))
    expected = make_compressor(MergeConfig(num_regions=10, compressor="hpool"))(
        VisualTokens(vectors[None], visual_coords(5, 8))
    )
    assert (ours - expected.tokens[0]).abs().max() < 1e-6
    theirs = modules.HierarchicalTokenPooling(4, num_protected_tokens=0).pool_one(vectors)
    assert ours.shape == theirs.shape == (10, 8)
    assert (ours @ theirs.T).max(1).values.min() < 0.999  # no one-to-one match of the clusters


def test_a_map_tells_what_each_patch_went_to(folders, images):
    model = st.attach(sentence_transformers.MultiVectorEncoder(folders("colqwen2"), device="cpu"), st.SamerPooling(5))
    documents = model.encode_document(images, output_value=None)
    query = model.encode_query(TEXTS[1])
    shapes = set()
    for document in documents:
        found = st.similarity_map(query, document)
        rows, columns = document["samer_grid"].tolist()
        shapes.add((rows, columns))
        source, owner = document["samer_source"].tolist(), document["samer_assignments"].tolist()
        vectors = document["token_embeddings"]
        for patch in range(rows * columns):
            expected = query @ vectors[owner[source[patch]]]
            assert (found[:, patch // columns, patch % columns] - expected).abs().max() < 1e-5
        assert source[rows * columns :] == [-1] * (len(source) - rows * columns)
    assert len(shapes) > 1
    with pytest.raises(InputError, match="which patch went where"):
        st.similarity_map(query, {"token_embeddings": documents[0]["token_embeddings"]})


def test_settings_come_back_from_a_folder(tmp_path, saved):
    pooling = st.SamerPooling("1/16", grid=[3, 4], spatial_weight=0.5, compressor="samer", tasks=["query", "document"])
    pooling.save(tmp_path)
    again = st.SamerPooling.load(str(tmp_path))
    assert (again.merge, again.grid, again.tasks) == (pooling.merge, (3, 4), ["query", "document"])
    retriever, folder = saved("colpali")
    assert st.load(folder, device="cpu")[-1].merge == MERGE
    about = json.loads((folder / "config_sentence_transformers.json").read_text())
    assert about["samer"]["projector"] == retriever.current_projector().hash


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"compressor": "sap-mean"}, "more than an image's vectors"),
        ({"compressor": "querybank"}, "more than an image's vectors"),
        ({"compressor": "hpc"}, "more than an image's vectors"),
        ({"compressor": "random"}, "more than an image's vectors"),
        ({"compressor": "hpol"}, "unknown"),
        ({"regions": 3}, "no setting 'regions'"),
        ({"num_regions": 0}, "at least 1"),
        ({"grid": (3,)}, r"\(rows, columns\)"),
        ({"grid": (0, 3)}, "at least one row"),
    ],
)
def test_settings_that_can_not_be_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        st.SamerPooling(**settings)


def test_vectors_that_do_not_fit_are_refused():
    vectors = torch.nn.functional.normalize(torch.randn(12, 8), dim=-1)
    pooling = st.SamerPooling(3)
    with pytest.raises(InputError, match="4 x 4 needs"):
        pooling.pool([vectors], grid=(4, 4))
    arrays = [pooling.pool([vectors], grid=form)[0] for form in ((3, 4), np.array([[3, 4]]), torch.tensor([[3, 4]]))]
    assert torch.equal(arrays[0], arrays[1])
    assert torch.equal(arrays[0], arrays[2])
    with pytest.raises(InputError, match=r"\(rows, columns\)"):
        pooling.pool([vectors], grid=[(3, 4, 1)])
    with pytest.raises(InputError, match="2 grids for 1 images"):
        pooling.pool([vectors], grid=[(3, 4), (3, 4)])
    with pytest.raises(InputError, match="needs its attention_mask"):
        pooling.pool(vectors[None], grid=(3, 4))
    with pytest.raises(InputError, match="unit vectors"):
        pooling.pool([3 * vectors], grid=(3, 4))
    with pytest.raises(InputError, match="needs grid="):
        st.SamerPooling(3, compressor="grid").pool([vectors])
    features = {"token_embeddings": vectors[None], "attention_mask": torch.ones(1, 12)}
    with pytest.raises(InputError, match=r"samer\.st\.attach"):
        pooling(features)
    assert pooling(features, task="query") is features


def test_models_that_do_not_fit_are_refused(tmp_path, folders, saved):
    model = st.load(saved("colpali")[1], device="cpu")
    with pytest.raises(InputError, match="pools its vectors already"):
        st.attach(model, st.SamerPooling(3))
    with pytest.raises(InputError, match=r"ColModernVBertForRetrieval.*samer\.st\.save"):
        st.load(folders("modernvbert"), st.SamerPooling(3), device="cpu")
    with pytest.raises(InputError, match="holds no samer_pooling"):
        st.load(folders("colpali"), device="cpu")
    with pytest.raises(InputError, match="is there already"):
        st.save(saved("colpali")[1], saved("colpali")[0])
    with pytest.raises(InputError, match="more than an image's vectors"):
        st.save(tmp_path / "new", saved("colpali")[0], MergeConfig(compressor="sap-max"))
    assert not list(tmp_path.iterdir())


def test_a_pipeline_that_names_the_pooling_loads_for_those_who_trust_it(tmp_path, saved, images):
    model = st.load(saved("colpali")[1], device="cpu")
    model.save_pretrained(str(tmp_path))
    options = {"device": "cpu", "processor_kwargs": {"backend": "pil"}}  # sentence-transformers does not save that
    again = sentence_transformers.MultiVectorEncoder(str(tmp_path), trust_remote_code=True, **options)
    assert again[-1].merge == MERGE
    for one, other in zip(model.encode_document(images), again.encode_document(images), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    with pytest.raises(ValueError, match="trust_remote_code"):
        sentence_transformers.MultiVectorEncoder(str(tmp_path), device="cpu")
