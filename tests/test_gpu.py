"""On a GPU: an index, a search and an encoder give what the CPU gives, and a ColPali of full size fits.

    pytest -m gpu tests/test_gpu.py -s

What is checked there is also checked with the CPU in the GPU's place, so that the checks themselves are known to work.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from samer.codes import COMPONENTS, learn
from samer.config import MergeConfig
from samer.data import flickr
from samer.evaluation import join_queries
from samer.features.read import open_encoder
from samer.index.read import Index
from samer.index.write import build_index
from samer.retrievers.hf import Retriever
from samer.scoring import StoredImages, pack_signs, score_stored
from samer.tokens import QueryTokens
from samer.world.retriever import PUBLISHED, Geometry, build_colpali, in_halves, page_texts, train_tokenizer

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or hidden without -m gpu")
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])
DEVICES = ["cpu", GPU]
DTYPES = ["float32", "bfloat16", "float16", "int8", "binary"]


@pytest.fixture
def exact_float32():
    """No TF32 in convolutions, where torch takes it by itself: it keeps 10 bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def built(folder, base, world, device, dtype):
    encoder = open_encoder(str(base), device, dtype=torch.float32)
    build_index(folder, world, ["test"], encoder, MergeConfig(num_regions=9), batch_size=3, dtype=dtype)
    return Index(folder)


@pytest.fixture(scope="module")
def on_the_cpu(base, world, tmp_path_factory):
    """Indexes made on the CPU, by dtype."""
    made = {}

    def get(dtype):
        if dtype not in made:
            made[dtype] = built(tmp_path_factory.mktemp("cpu") / dtype, base, world, "cpu", dtype)
        return made[dtype]

    return get


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_an_index_made_on_the_device_scores_as_the_cpus(
    exact_float32, on_the_cpu, base, world, tmp_path, device, dtype
):
    expected, image_of = on_the_cpu(dtype).scores("test")
    scores, owner = built(tmp_path / "index", base, world, device, dtype).scores("test")
    assert torch.equal(owner, image_of)
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=0)
    assert expected.std(1).min() > 2e-3  # images differ by more than that
    for ours, theirs in zip(scores, expected):
        order = theirs.argsort(descending=True)
        clear = theirs[order][:-1] - theirs[order][1:] > 2e-3  # neighbours that no tolerance may swap
        assert (ours[order][:-1] > ours[order][1:])[clear].all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_search_on_the_device_finds_what_the_cpu_finds(exact_float32, on_the_cpu, device, dtype):
    index = on_the_cpu(dtype)
    queries = join_queries([query for query, _, _ in index.queries("test")])
    there = type(queries)(queries.tokens.to(device), queries.mask.to(device))
    fresh = Index(index.folder)  # nothing on the device yet
    for _ in range(2):  # the second finds the index there
        found = fresh.search(there, "test", 8, device)
        for ours, theirs in zip(found, index.search(queries, "test", 8)):
            scores = dict(theirs)
            assert [score for _, score in ours] == pytest.approx([score for _, score in theirs], abs=1e-4)
            assert {name: pytest.approx(score, abs=1e-4) for name, score in ours} == scores
            best, second = theirs[0][1], theirs[1][1]
            assert ours[0][0] == theirs[0][0] or best - second < 2e-4
    scores, _ = fresh.scores("test", device)
    torch.testing.assert_close(scores, index.scores("test")[0], atol=1e-4, rtol=0)
    assert scores.device.type == "cpu"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [8, 16, 24, 64, 128])
def test_products_of_every_size_are_the_cpus(device, width):
    generator = torch.Generator().manual_seed(width)
    for queries, length, images, regions in (
        (1, 1, 1, 1),
        (1, 5, 3, 6),
        (5, 13, 7, 9),
        (20, 60, 40, 3),
        (79, 40, 8, 9),
    ):
        tokens = torch.randint(-127, 128, (images, regions, width), generator=generator, dtype=torch.int8)
        words = F.normalize(torch.randn(queries, length, width, generator=generator), dim=-1)
        mask = torch.ones(queries, length, dtype=torch.bool)
        for kind in (StoredImages(tokens, 0.01), StoredImages(pack_signs(tokens.float()))):
            there = replace(kind, tokens=kind.tokens.to(device))
            found = score_stored(QueryTokens(words.to(device), mask.to(device)), there)
            expected = score_stored(QueryTokens(words, mask), kind)
            torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", COMPONENTS)
def test_codes_are_looked_up_on_the_device_as_on_the_cpu(device, kind):
    generator = torch.Generator().manual_seed(3)
    normal = lambda *shape: F.normalize(torch.randn(*shape, generator=generator), dim=-1)
    tokens, mask = normal(70, 7, 32), torch.arange(7) < torch.arange(70)[:, None] % 7 + 1
    codebook = learn(kind, tokens, mask)
    codes = codebook.encode(tokens, mask)
    there, own = codebook.to(device), [codes.codes, codes.scales, mask, None, codes.bases]
    assert torch.equal(there.decode(codes.codes.to(device)).cpu(), codebook.decode(codes.codes))
    for queries, length in ((1, 1), (3, 9), (40, 33)):
        words, valid = normal(queries, length, 32), torch.ones(queries, length, dtype=torch.bool)
        moved = [None if each is None else each.to(device) for each in own]
        found = score_stored(QueryTokens(words.to(device), valid.to(device)), StoredImages(*moved, there))
        expected = score_stored(QueryTokens(words, valid), StoredImages(*own, codebook))
        torch.testing.assert_close(found.cpu(), expected, atol=2e-3, rtol=0)  # a turned query may round otherwise


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_on_the_device_is_near_float32_on_the_cpu(base, world, device):
    records = flickr.load_split(world, "test", boxes=False)
    exact = open_encoder(str(base), "cpu", dtype=torch.float32)
    half = open_encoder(str(base), device, dtype=torch.bfloat16)
    images = exact.encode_images(exact.record_inputs(records)), half.encode_images(half.record_inputs(records))
    texts = [caption.text for record in records for caption in record.captions]
    queries = exact.encode_queries(exact.query_inputs(texts)), half.encode_queries(half.query_inputs(texts))
    for ours, theirs in (images, queries):
        assert theirs.tokens.dtype == torch.float32
        assert theirs.tokens.device.type == torch.device(device).type
        cosine = F.cosine_similarity(ours.tokens, theirs.tokens.cpu(), dim=-1)
        valid = torch.ones_like(cosine, dtype=torch.bool) if ours.mask is None else ours.mask
        assert cosine[valid].min() > 0.99


# --- a ColPali of full size -----------------------------------------------------------------------------------------

SMALL = Geometry(
    image_size=112,
    patch_size=14,
    **{
        f"{kind}_{name}": size
        for kind in ("vision", "text")
        for name, size in (("width", 32), ("layers", 2), ("mlp", 48))
    },
    heads=4,
    embedding_dim=128,
    text_heads=2,
    vocabulary=4000,
)


def encode_four(device, geometry):
    """Four images through a random ColPali of these sizes, made on the device: tokens, bytes of weights, peak bytes."""
    tokenizer = train_tokenizer(page_texts(20, 0), 500)
    with in_halves(device):
        model, processor = build_colpali(tokenizer, geometry, seed=0)
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    retriever = Retriever(model, processor, "a random ColPali")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4, 300, 400, 3), dtype=torch.uint8, generator=generator)
    images = [Image.fromarray(each.numpy()) for each in pixels]
    peak = 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    visual = retriever.encode_images(retriever.image_inputs(images))
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return visual, weights, peak


def check_tokens(visual, patches):
    assert visual.tokens.shape == (4, patches + 6, 128)
    torch.testing.assert_close(visual.tokens.norm(dim=-1), torch.ones_like(visual.tokens[..., 0]))
    assert (visual.patches.sum(1) == patches).all()


@pytest.mark.gpu
@needs_cuda
def test_the_peak_memory_of_a_full_size_colpali():
    free, _ = torch.cuda.mem_get_info()
    if free < 12e9:
        pytest.skip(f"{free / 1e9:.1f} GB free on the GPU; 12 are needed")
    visual, weights, peak = encode_four("cuda", PUBLISHED)
    print(f"\nfull-size ColPali, bfloat16: weights {weights / 1e9:.2f} GB, peak with 4 images {peak / 1e9:.2f} GB")
    check_tokens(visual, 1024)
    assert 5.8e9 < weights < 5.9e9
    # a layer's widest tensors: 3 of 4 x 1,030 x 16,384 halves are 0.4 GB; those of all layers would be 7 GB
    assert peak < weights + 2e9


def test_a_small_colpali_goes_the_same_way():
    visual, weights, _ = encode_four("cpu", SMALL)
    check_tokens(visual, 64)
    assert weights < 1e6
    assert torch.get_default_dtype() == torch.float32


def test_the_full_size_is_that_of_the_released_model():
    """Counted without memory: PaliGemma's 2.92 billion at 448 pixels, and METHOD's 262,272 of the projection."""
    with torch.device("meta"):
        model, _ = build_colpali(train_tokenizer(page_texts(20, 0), 500), PUBLISHED, seed=0)
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    own = sum(size for name, size in sizes.items() if name.startswith("embedding_proj_layer"))
    assert own == 262_272
    assert sum(sizes.values()) - own == 2_924_351_216
