"""The kernel that scans stored images on a GPU, against float64; and that one which is wrong is not used.

pytest -m gpu tests/test_kernels.py                     on a GPU
TRITON_INTERPRET=1 pytest tests/test_kernels.py         on any machine that has Triton, in its interpreter
"""

import os
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from samer import products, scoring
from samer.config import InputError
from samer.products import WORDS, fused_scan_works, sign_table, unpack_signs
from samer.scoring import StoredImages, score_stored
from samer.tokens import QueryTokens

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None,
    reason="Triton's kernels need a GPU (-m gpu), or Triton and TRITON_INTERPRET=1",
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or hidden without -m gpu")
DEVICES = [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])]
KINDS = ["int8", "float32", "float16", "bfloat16", "8 bytes", "4 bytes", "2 bytes", "signs"]
WIDTH = 64


def drawn(kind, images, regions, generator):
    """Stored vectors, what they are looked up by, and the numbers that they stand for."""
    integers = lambda *shape: torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    if kind == "int8":
        stored = integers(images, regions, WIDTH)
        return stored, None, stored
    if kind.startswith(("float", "bfloat")):
        stored = torch.randn(images, regions, WIDTH, generator=generator).to(getattr(torch, kind))
        return stored, None, stored
    stored = torch.randint(0, 256, (images, regions, WIDTH // 8), generator=generator, dtype=torch.uint8)
    if kind == "signs":
        return stored, sign_table(torch.device("cpu")), unpack_signs(stored)
    each = int(kind[0])
    tables = integers(WIDTH // each, 256, each)
    stored = torch.randint(0, 256, (images, regions, len(tables)), generator=generator, dtype=torch.uint8)
    numbers = torch.cat([table[stored[..., k].long()] for k, table in enumerate(tables)], dim=2)
    return stored, tables.view(WORDS[each]).flatten(), numbers


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("regions", [1, 7, 64, 130, 300])
def test_sums_of_maxima_are_those_of_float64(device, kind, regions):
    from samer.kernels import scan

    generator = torch.Generator().manual_seed(regions)
    stored, words, numbers = drawn(kind, 9, regions, generator)
    mask = torch.rand(9, regions, generator=generator) < 0.6
    mask[:, -1] = True
    for lengths in ([1], [3, 17, 1], [9, 40, 8], [150, 2]):
        count = sum(lengths)
        asked = torch.randn(count, WIDTH, generator=generator)
        if not stored.is_floating_point():
            asked = (asked * 40).round().clamp(-127, 127).to(torch.int8)
        weights = torch.rand(count, generator=generator)
        products = torch.einsum("nd,ikd->nik", asked.double(), numbers.double())
        for own in (None, mask):
            best = products if own is None else products.masked_fill(~own, -torch.inf)
            sums = (best.amax(2) * weights[:, None].double()).split(lengths)
            expected = torch.stack([each.sum(0) for each in sums])
            given = [None if each is None else each.to(device) for each in (stored, own, words)]
            found = scan(asked, weights, torch.tensor(lengths), *given).cpu().double()
            assert (found - expected).abs().max() <= 3e-6 * expected.abs().max()


@pytest.mark.parametrize("device", DEVICES)
def test_an_image_that_is_not_finite_scores_nan_though_its_vector_wins_nowhere(device):
    from samer.kernels import scan

    for regions in (3, 200):
        stored = torch.ones(4, regions, WIDTH)
        stored[1, 0, 5], stored[2, -1, 0] = float("nan"), float("-inf")
        mask = torch.ones(4, regions, dtype=torch.bool)
        words = torch.ones(2, WIDTH), torch.ones(2), torch.tensor([2])
        found = scan(*words, stored.to(device))
        assert found.isnan().tolist() == [[False, True, True, False]]
        mask[1, 0] = mask[2, -1] = False  # what is not there may hold anything
        assert scan(*words, stored.to(device), mask.to(device)).tolist() == [[2.0 * WIDTH] * 4]


@pytest.mark.gpu
@needs_cuda
def test_a_search_on_a_gpu_uses_it_and_names_an_image_that_is_not_finite(monkeypatch):
    import samer.kernels

    calls, plain = [], samer.kernels.scan
    monkeypatch.setattr(samer.kernels, "scan", lambda *words: calls.append(0) or plain(*words))
    asked = QueryTokens(torch.rand(2, 3, 128).cuda(), torch.ones(2, 3, dtype=torch.bool).cuda())
    tokens = torch.rand(5, 4, 128)
    for images in (tokens, tokens.half(), tokens.bfloat16()):
        torch.testing.assert_close(
            score_stored(asked, StoredImages(images.cuda())).cpu(),
            score_stored(QueryTokens(asked.tokens.cpu(), asked.mask.cpu()), StoredImages(images)),
        )
    assert len(calls) >= 3
    tokens[3, 1, 7] = float("nan")
    with pytest.raises(InputError, match="images: row 3"):
        score_stored(asked, StoredImages(tokens.cuda()))


class Stand(str):
    """The CPU, that says it were a GPU."""

    type = "cuda"


def exact(asked, weights, lengths, stored, mask, words):
    assert words is None
    best = torch.einsum("nd,ikd->nik", asked.float(), stored.float()).masked_fill(~mask, -torch.inf).amax(2)
    return torch.stack([own.sum(0) for own in (best * weights[:, None]).split(lengths.tolist())])


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a kernel in the place of the real one, which nothing was asked of yet."""
    products._scan_works.cache_clear()
    yield lambda scan, fits=lambda *_: True: monkeypatch.setitem(
        sys.modules, "samer.kernels", SimpleNamespace(scan=scan, fits=fits, ROWS=64, VECTORS=128)
    )
    products._scan_works.cache_clear()


def refused(*_):
    raise RuntimeError("no kernel image is available for execution on the device")


@pytest.mark.parametrize(
    ("scan", "right"),
    [(exact, True), (lambda *words: exact(*words) * 1.001, False), (refused, False)],
    ids=["right", "wrong", "refused"],
)
def test_a_kernel_that_does_not_work_is_not_used(stand_in, scan, right):
    stand_in(scan, lambda width, code_bytes: width == 128)
    trial = fused_scan_works
    for dtype in (torch.int8, torch.float32, torch.bfloat16):
        assert trial(Stand("cpu"), dtype, 128, 0, 64) is right
        assert trial(Stand("cpu"), dtype, 128, 0, 200) is right
        assert trial(Stand("cpu"), dtype, 96, 0, 64) is False  # a width that it does not take
    assert trial(torch.device("cpu"), torch.int8, 128, 0, 64) is False


def test_without_triton_torch_scans(monkeypatch):
    monkeypatch.setitem(sys.modules, "samer.kernels", None)
    assert fused_scan_works(Stand("cpu"), torch.int8, 128, 0, 64) is False


def test_too_little_memory_is_no_kernel_that_does_not_work(stand_in):
    def scan(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    stand_in(scan)
    with pytest.raises(torch.OutOfMemoryError):
        fused_scan_works(Stand("cpu"), torch.int8, 128, 0, 64)


@pytest.mark.parametrize("device", DEVICES)
def test_what_triton_refuses_later_is_left_to_torch(monkeypatch, device):
    from samer import kernels

    def scan(*_):
        raise kernels.Refused("out of resource: shared memory")

    monkeypatch.setattr(scoring, "fused_scan_works", lambda *_: True)
    monkeypatch.setattr(kernels, "scan", scan)
    queries = QueryTokens(torch.rand(2, 3, 128, device=device), torch.ones(2, 3, dtype=torch.bool, device=device))
    images = StoredImages(torch.rand(5, 4, 128, device=device))
    assert scoring._in_one_pass(queries, images) is None
    assert score_stored(queries, images).shape == (2, 5)


@interpreted
def test_scores_in_one_pass_are_those_of_torch(monkeypatch):
    """Every kind of index, in the interpreter; on a GPU tests/test_gpu.py compares them."""
    import torch.nn.functional as F

    from samer.codes import COMPONENTS, learn
    from samer.scoring import pack_signs, quantise_images

    monkeypatch.setattr(scoring, "fused_scan_works", lambda _, *words: fused_scan_works(Stand("cpu"), *words))
    generator = torch.Generator().manual_seed(1)
    normal = lambda *shape: F.normalize(torch.randn(*shape, generator=generator), dim=-1)
    tokens, mask = normal(70, 7, 32), torch.arange(7) < torch.arange(70)[:, None] % 7 + 1
    queries = QueryTokens(normal(4, 9, 32), torch.arange(9) < torch.tensor([9, 3, 1, 5])[:, None])
    whole, scales = quantise_images(tokens)
    kinds = [StoredImages(tokens, None, mask), StoredImages(tokens.half()), StoredImages(whole, scales, mask)]
    kinds += [StoredImages(whole, 0.01), StoredImages(pack_signs(tokens), None, mask)]
    for kind in COMPONENTS:
        codebook = learn(kind, tokens, mask)
        codes = codebook.encode(tokens, mask)
        kinds.append(StoredImages(codes.codes, codes.scales, mask, None, codes.bases, codebook))
    for images in kinds:
        found = scoring._in_one_pass(queries, images)
        torch.testing.assert_close(found, score_stored(queries, images), atol=1e-6, rtol=0)
