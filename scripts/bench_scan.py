"""Benchmark of MaxSim on a GPU: the one-pass kernel beside torch's products, and beside other kernels where they are.

python scripts/bench_scan.py [--images 200000] [--json FILE] [--markdown FILE]

Other kernels are flash-maxsim and late-interaction-kernels. Each is called with what it takes; errors are against
float64 on some of the images, overlaps against the ten best of float32. Vectors are random, 64 of each image, 128 wide.
"""

import sys
from os.path import dirname, realpath

if not __package__:
    sys.path.insert(0, dirname(dirname(realpath(__file__))))
if __name__ == "__main__":
    from samer.runtime.early import heed_interrupts

    heed_interrupts()

import argparse
import statistics
import time
from contextlib import contextmanager
from importlib.util import find_spec

from samer.runtime.commands import run
from scripts.bench import Table, await_quiet, keep, machine
from scripts.bench_bits import overlap

REGIONS, WIDTH, LENGTH = 64, 128, 24
CHECKED = 2000  # images that are scored in float64, too


def timed(runs, function):
    """Median milliseconds of a function, and the most memory that it took beyond what was held, in MB."""
    import torch

    there, times = torch.cuda.is_available(), []
    for turn in range(runs + 2):
        if there:
            torch.cuda.synchronize()
            if turn == 2:
                held = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        function()
        if there:
            torch.cuda.synchronize()
        if turn >= 2:
            times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times), (torch.cuda.max_memory_allocated() - held) / 1e6 if there else None


@contextmanager
def by_torch():
    """Within the block the kernel is not used."""
    from samer import scoring

    plain = scoring.fused_scan_works
    scoring.fused_scan_works = lambda *_: False
    try:
        yield
    finally:
        scoring.fused_scan_works = plain


def float64(queries, images):
    """Mean of maxima, (Q, I), in float64."""
    import torch

    rows = [torch.einsum("md,ikd->mik", query.double(), images.double()).amax(2).mean(0) for query in queries]
    return torch.stack(rows)


def stored_kinds(images, device):
    """Ways to store images (I, K, D), by name: what is scored, and the numbers of some of them."""
    import torch

    from samer.codes import learn
    from samer.products import unpack_signs
    from samer.scoring import StoredImages, pack_signs, quantise_images

    some = images[:CHECKED]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield str(dtype).removeprefix("torch."), StoredImages(images.to(dtype)), some.to(dtype)
    parts = [quantise_images(part) for part in images.split(20000)]
    whole, scales = (torch.cat(each) for each in zip(*parts))
    yield "int8", StoredImages(whole, scales), whole[:CHECKED] * scales[:CHECKED, None, None]
    signs = torch.cat([pack_signs(part) for part in images.split(20000)])
    yield "signs", StoredImages(signs), unpack_signs(signs[:CHECKED]).float() * WIDTH**-0.5
    full = torch.ones(CHECKED, REGIONS, dtype=torch.bool)
    for kind in ("1bit", "2bit", "4bit"):
        codebook = learn(kind, some[:256].cpu(), full[:256])
        codes = codebook.encode(some.cpu(), full)
        times = len(images) // CHECKED
        own = [
            each.repeat(times, *[1] * (each.ndim - 1)).to(device) for each in (codes.codes, codes.scales, codes.bases)
        ]
        numbers = codebook.vectors(codes, full).to(device)
        yield kind, StoredImages(own[0], own[1], None, None, own[2], codebook.to(device)), numbers


def searching(runs, count, device):
    """Rows of every way to store images, and of other kernels."""
    import torch
    import torch.nn.functional as F

    from samer.scoring import StoredImages, score_stored
    from samer.tokens import QueryTokens

    generator = torch.Generator(device).manual_seed(0)
    images = torch.empty(count, REGIONS, WIDTH, device=device)
    for part in images.split(20000):
        part.copy_(F.normalize(torch.randn(part.shape, generator=generator, device=device), dim=-1))
    tokens = F.normalize(torch.randn(32, LENGTH, WIDTH, generator=generator, device=device), dim=-1)
    asked = {n: QueryTokens(tokens[:n], torch.ones(n, LENGTH, dtype=torch.bool, device=device)) for n in (1, 32)}
    best = score_stored(asked[32], StoredImages(images)).topk(10, dim=1).indices
    same = lambda scores: overlap(best, scores.topk(10, dim=1).indices)
    rows = []
    for name, stored, numbers in stored_kinds(images, device):
        expected = float64(tokens, numbers)
        for n, queries in asked.items():
            with by_torch():
                plain = timed(max(3, runs // 4), lambda q=queries, s=stored: score_stored(q, s))
                error = float((score_stored(queries, stored)[:, :CHECKED] - expected[:n]).abs().max())
            fused = timed(runs, lambda q=queries, s=stored: score_stored(q, s))
            scores = score_stored(queries, stored)
            row = {"stored as": name, "queries": n, "torch, ms": plain[0], "one pass, ms": fused[0]}
            row |= {"ratio": plain[0] / fused[0], "torch, MB": plain[1], "one pass, MB": fused[1]}
            row |= {"torch, error": error, "error": float((scores[:, :CHECKED] - expected[:n]).abs().max())}
            # codes are of the first images, again and again, so that their ten best say nothing
            rows.append({**row, "overlap@10": same(scores) if n == 32 and not name.endswith("bit") else None})
    return rows, [*others(runs, images, tokens, same)]


def others(runs, images, tokens, same):
    """Rows of kernels that other people made, where they are installed."""
    import torch

    half, brain = (images.half(), tokens.half()), (images.bfloat16(), tokens.bfloat16())
    calls = {}
    if find_spec("flash_maxsim"):
        import flash_maxsim as flash

        calls["flash-maxsim, float16"] = lambda n: flash.flash_maxsim_batched(half[1][:n], half[0], pad_lq=False)
        parts = [flash.quantize_int8_symmetric(part) for part in half[0].split(20000)]
        whole, scales = (torch.cat(each) for each in zip(*parts))
        each = lambda query: flash.flash_maxsim_int8x8(query, whole, scales)
        calls["flash-maxsim, int8"] = lambda n: torch.stack([each(query) for query in half[1][:n]])
    if find_spec("late_interaction_kernels"):
        from late_interaction_kernels import maxsim as theirs

        calls["late-interaction-kernels, bfloat16"] = lambda n: theirs(brain[1][:n], brain[0])
        calls["late-interaction-kernels, float16"] = lambda n: theirs(half[1][:n], half[0])
    expected = float64(tokens, images[:CHECKED])
    for name, call in calls.items():
        for n in (1, 32):
            took = timed(runs, lambda call=call, n=n: call(n))
            scores = call(n) / LENGTH
            row = {"kernel": name, "queries": n, "ms": took[0], "MB": took[1]}
            row |= {"error": float((scores[:, :CHECKED] - expected[:n]).abs().max())}
            yield {**row, "overlap@10": same(scores) if n == 32 else None}


def training(runs, device):
    """Rows of a forward and a backward pass over queries and images of one batch."""
    import torch
    import torch.nn.functional as F

    from samer.scoring import maxsim

    rows = []
    for size in (32, 128, 512):
        generator = torch.Generator(device).manual_seed(1)
        draw = lambda *shape, g=generator: F.normalize(torch.randn(*shape, generator=g, device=device), dim=-1)
        queries, images = draw(size, LENGTH, WIDTH), draw(size, REGIONS, WIDTH)
        target = torch.arange(size, device=device)

        def step(score, dtype, queries=queries, images=images, target=target):
            q, d = (each.to(dtype, copy=True).requires_grad_() for each in (queries, images))
            F.cross_entropy(score(q, d) / 0.02, target).backward()
            return q.grad, d.grad

        calls = {"torch, as in training": (maxsim, torch.float32)}
        if find_spec("late_interaction_kernels"):
            from late_interaction_kernels import maxsim as theirs

            for dtype in (torch.float32, torch.bfloat16):
                name = f"late-interaction-kernels, {str(dtype).removeprefix('torch.')}"
                calls[name] = (lambda q, d: theirs(q, d) / LENGTH, dtype)
        if find_spec("flash_maxsim"):
            from flash_maxsim import flash_maxsim_batched_train as flash

            calls["flash-maxsim, float16"] = (lambda q, d: flash(q, d) / LENGTH, torch.float16)
        exact = step(maxsim, torch.float64)
        for name, (score, dtype) in calls.items():
            took, held = timed(runs, lambda score=score, dtype=dtype: step(score, dtype))
            apart = [float((a.double() - b).norm() / b.norm()) for a, b in zip(step(score, dtype), exact)]
            row = {"batch": size, "kernel": name, "ms": took, "MB": held}
            rows.append({**row, "error of queries' gradient": apart[0], "of images'": apart[1]})
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200000, help="how many (200000), at least 2000")
    parser.add_argument("--runs", type=int, default=10, help="timed calls of each (10)")
    parser.add_argument("--wait", type=float, default=60, metavar="SECONDS", help="for a quiet machine, at most (60)")
    parser.add_argument("--json", default="", metavar="FILE", help="figures, and what they were measured on")
    parser.add_argument("--markdown", default="", metavar="FILE", help="the same as a page's table")
    options = parser.parse_args(argv)
    quiet, load = await_quiet(options.wait)
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = {"command": f"python scripts/bench_scan.py --images {options.images}", "quiet": quiet, "load": load}
    about["machine"] = machine()
    with torch.no_grad():
        rows, beside = searching(options.runs, options.images, device)
    found = [Table(f"{options.images:,} images of {REGIONS} vectors, queries of {LENGTH} tokens", rows)]
    found += [Table("Other kernels, the same vectors", beside)] if beside else []
    found.append(Table("Scores of a batch and their gradients", training(options.runs, device)))
    return keep(found, about, options)


if __name__ == "__main__":
    run(main)
