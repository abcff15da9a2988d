"""Five small jobs that write to disk, and a server that runs each in a process of its own, ready in milliseconds.

Run as a script, this file is the server: it imports everything once, computes nothing, and for each order forks a child
that runs an entry point as `python scripts/X.py` would: own process group, real signals, a real end. Orders and answers
are JSON lines on stdin and stdout.

An order may hold a moment: {"at": n, "do": what} strikes when the child is about to change the n-th file of its output
folder (or to make, move or remove one), {"limit": bytes} lets no file grow beyond that from the start on, and
{"late": true} has the answer wait for the first such change, not only for the entry point. "do" is:

    kill, stop, term    the signal of that name
    limit               no file may grow beyond "bytes" any more: File too large
    tear                the same, but the process dies in the middle of the write that would
"""

import contextlib
import ctypes
import functools
import gc
import importlib
import itertools
import json
import mmap
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMALL = {  # shards, so that each job makes many; and a comparison's report, which is made anew by each run
    "samer.features.write": {"IMAGES_PER_SHARD": 4, "TEXTS_PER_SHARD": 8},
    "samer.index.write": {"IMAGES_PER_SHARD": 2, "QUERIES_PER_SHARD": 6},
    "samer.index.pictures": {"PICTURES_PER_SHARD": 4},
    "samer.report.gallery": {"PER_RULE": 1, "TOP": 2},
    "samer.report.page": {"EVIDENCE_SIDE": 40},
}
COMPARED = ("none", "samer", "hpool", "hpc", "sap-mean")  # what a report's gallery shows
SCRIPTS = ("train", "features", "cache", "index", "compare")
LAZY = (  # what they import on the way
    "transformers.conversion_mapping",
    "transformers.models.colpali.modeling_colpali",
    "transformers.models.colpali.processing_colpali",
    "transformers.models.gemma.modeling_gemma",
    "transformers.models.paligemma.modeling_paligemma",
    "transformers.models.siglip.modeling_siglip",
    "transformers.models.siglip.image_processing_pil_siglip",
    "transformers.models.gemma.tokenization_gemma",
    "PIL.BmpImagePlugin",
    "PIL.GifImagePlugin",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "PIL.PpmImagePlugin",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "matplotlib.pyplot",
    "samer.compare.run",
    "samer.features.write",
    "samer.index.pictures",
    "samer.index.sync",
    "samer.index.write",
    "samer.report.page",
    "samer.report.tables",
    "samer.search.open_index",
    "samer.training.loop",
)
SETTINGS = """
model: {{name: {base}}}
data: {{root: {world}, limit_train_images: {images}, limit_eval_images: 4}}
merge: {{num_regions: 6}}
train:
  train_batch_size: 8
  eval_batch_size: 8
  grad_accum_steps: 1
  learning_rate: 5.0e-3
  num_train_epochs: {epochs}
  bf16: false
  dataloader_num_workers: 0
  save_steps: 2
  logging_steps: 3
  select_best: {best}
"""


# --- the jobs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One command. Its output folder is always the same place, as some files name it."""

    name: str
    script: str
    words: list[str]
    out: Path
    seed: dict[str, bytes] = field(default_factory=dict)  # what the folder holds beforehand


def paint(folder: Path, names) -> None:
    """Pictures of noise, each from its name."""
    import numpy as np
    from PIL import Image

    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def make_jobs(root: Path, base: Path, world: Path, server: "Server") -> dict[str, Job]:
    """The jobs by name: their data under `root`, the retriever at `base`, captioned images in `world`."""
    runs = {"train": (4, 3, "true"), "compare": (2, 1, "false")}
    for name, (images, epochs, best) in runs.items():
        text = SETTINGS.format(base=base, world=world, images=images, epochs=epochs, best=best)
        (root / f"{name}.yaml").write_text(text)
    model = [f"model.name={base}", "merge.num_regions=6"]
    data = ["--data-root", str(world), "--batch-size", "4"]
    out = lambda name: root / name.replace(" ", "_").replace(",", "") / "out"
    train = lambda name, *more: ["--config", str(root / "train.yaml"), *more, f"train.output_dir={out(name)}"]
    pictures = ["--images", str(root / "pictures"), "--batch-size", "4"]
    jobs = {
        "train": ("train", train("train")),
        "train, workers": ("train", train("train, workers", "train.dataloader_num_workers=1")),
        "features": (
            "features",
            ["--out", str(out("features")), *data, "--splits", "val", "test", "--dtype", "int8", *model],
        ),
        "cache": (
            "cache",
            [
                *("--cache-dir", str(out("cache")), *data, "--splits", "val", "test"),
                *("--cache-dtype", "binary", "--assignments", "--limit-images", "6", *model),
            ],
        ),
        "index append": ("index", ["--cache-dir", str(out("index append")), *pictures, *model]),
        "compare": (
            "compare",
            [
                *("--out", str(out("compare")), "--data-root", str(world), "--config", str(root / "compare.yaml")),
                *("--seeds", "0", "--sections", "untouched", "crossed"),
            ],
        ),
    }
    made = {name: Job(name, script, words, out(name)) for name, (script, words) in jobs.items()}
    names = [f"p{k:02}.png" for k in range(36)]
    paint(root / "pictures", names[:8])
    append = made["index append"]
    assert server.run(append)["code"] == 0
    paint(root / "pictures", names[8:])
    seed = {str(p.relative_to(append.out)): p.read_bytes() for p in append.out.rglob("*") if p.is_file()}
    return {**made, "index append": Job(append.name, append.script, append.words, append.out, seed)}


# --- the side that asks ---------------------------------------------------------------------------------------------


class Server:
    """The helper process; `start` answers when the child is about to run the entry point."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, **order):
        print(json.dumps(order), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, "the server of children died"
        return json.loads(answer)

    def start(self, job: Job, **moment) -> int:
        """Number of the new process."""
        return self.ask(script=job.script, words=job.words, out=str(job.out), **moment)["pid"]

    def wait(self, pid: int, limit: float = 60) -> dict:
        """Of an ended process: code, seconds, stdout, stderr, and what it told.

        A code of None: it ran longer than the limit and was killed. step: the last one trained. operations: changes
        of files; first: when the first was. left: how many processes of its group were still there half a second
        later, after a killed one ten seconds.
        """
        return self.ask(wait=pid, limit=limit)

    def run(self, job: Job, **moment) -> dict:
        return self.wait(self.start(job, **moment))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(20)


# --- the server -----------------------------------------------------------------------------------------------------

PLACE = struct.Struct("qqd")  # what a child tells: changes of files, the step it trains, when the first change was
BOARD = mmap.mmap(-1, 64 * PLACE.size)  # of the last 64 children
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
FILES = {  # audit event -> places of (path, its folder's descriptor) among the arguments
    "open": [(0, None)],
    "os.chmod": [(0, 2)],
    "os.mkdir": [(0, 2)],
    "os.remove": [(0, 1)],
    "os.rename": [(0, 2), (1, 3)],
    "os.rmdir": [(0, 1)],
    "os.truncate": [(0, None)],
}


def serve() -> dict | None:
    """Takes orders until stdin ends (None); in a child it returns that child's order."""
    children = {}
    for number, line in enumerate(iter(sys.stdin.readline, "")):
        order = json.loads(line)
        if "wait" in order:
            answer = finish(children.pop(order["wait"]), order["wait"], order["limit"])
        else:
            ready, out, err = (os.pipe() for _ in range(3))
            order["place"] = number % 64 * PLACE.size
            PLACE.pack_into(BOARD, order["place"], 0, 0, 0.0)
            pid = os.fork()
            if pid == 0:
                dress(out[1], err[1])
                return {**order, "ready": ready[1]}
            for pipe in (ready, out, err):
                os.close(pipe[1])
            os.read(ready[0], 1)
            os.close(ready[0])
            children[pid] = (time.monotonic(), order["place"], out[0], err[0])
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)
    return None


def finish(child: tuple, pid: int, limit: float) -> dict:
    """Waits for a child, collects what it said, and ends what is left of its group."""
    started, place, *pipes = child
    said, code = [b"", b""], None
    while code is None and time.monotonic() - started < limit:
        drain(pipes, said, 0.002)
        done, status = os.waitpid(pid, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if done else None
    seconds = time.monotonic() - started
    if code is None:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    patience = time.monotonic() + (10 if code == -signal.SIGKILL else 0.5)
    while (left := rest_of(pid)) and time.monotonic() < patience:
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    drain(pipes, said, 0)
    for pipe in pipes:
        os.close(pipe)
    operations, step, first = PLACE.unpack_from(BOARD, place)
    told = {"operations": operations, "step": step, "first": max(0.0, first - started)}
    words = dict(zip(("stdout", "stderr"), (text.decode(errors="replace") for text in said)))
    return {"code": code, "seconds": seconds, "left": left, **told, **words}


def drain(pipes: list[int], said: list[bytes], patience: float) -> None:
    """Reads what is there; a pipe that nobody writes to any more is not worth a wait."""
    for pipe in select.select(pipes, [], [], patience)[0]:
        part = os.read(pipe, 65536)
        said[pipes.index(pipe)] += part
        if not part:
            time.sleep(patience / 2)


def rest_of(group: int) -> int:
    """How many processes of a group live; dead ones are collected (they are ours: see `main`)."""
    count = 0
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass
        count = sum(stat_of(entry.name)[2] == str(group) for entry in os.scandir("/proc") if entry.name.isdigit())
    return count


def stat_of(pid: str) -> list[str]:
    """State, parent, group ... of a process."""
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return [""] * 3


# --- a child --------------------------------------------------------------------------------------------------------


def dress(out: int, err: int) -> None:
    """A process group of its own, and its own stdin, stdout and stderr."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def work(order: dict) -> None:
    """Runs the entry point; how it ends is how this process ends."""
    import torch

    from samer.runtime import commands as runtime_commands

    torch.set_num_threads(1)
    for module, values in SMALL.items():
        vars(sys.modules[module]).update(values)
    compared = sys.modules["samer.compare.plan"]
    compared.COMPRESSORS = {name: compared.COMPRESSORS[name] for name in COMPARED}
    plots = sys.modules["samer.report.plots"]
    for name in [name for name in plots.PLOTS if name != "grounding"]:
        del plots.PLOTS[name]
    sys.modules["samer.report.page"].panels = functools.partial(sys.modules["samer.report.drawing"].panels, height=20)
    count_steps(order["place"])
    watch_files(order)
    if order.get("do") == "tear":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    if "limit" in order:
        limit_files(order["limit"])
    main = sys.modules[f"scripts.{order['script']}"].main
    if not order.get("late"):
        os.write(order["ready"], b"!")
    runtime_commands.run(lambda: main(order["words"]))


def count_steps(place: int) -> None:
    """Notes each training step as it begins."""
    run = sys.modules["samer.training.loop"].Run
    plain = run.step

    def step(self, *words, **more):
        struct.pack_into("q", BOARD, place + 8, self.state.step + 1)
        return plain(self, *words, **more)

    run.step = step


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def watch_files(order: dict) -> None:
    """Counts changes of files in the output folder, and strikes at the one that the order names."""
    out, place, own = order["out"], order["place"], os.getpid()
    numbers = itertools.count(1)

    def full(path, folder) -> str:
        path = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path) if (folder or -1) >= 0 else path

    def look(event: str, words: tuple) -> None:
        if event not in FILES or (event == "open" and not (words[2] or 0) & WRITES) or os.getpid() != own:
            return
        paths = [full(words[at], None if of is None else words[of]) for at, of in FILES[event]]
        if not any(path.startswith(out) for path in paths):
            return
        number = next(numbers)
        struct.pack_into("q", BOARD, place, number)
        if number == 1:
            struct.pack_into("d", BOARD, place + 16, time.monotonic())
            if order.get("late"):
                os.write(order["ready"], b"!")
        if number == order.get("at"):
            strike(order)

    sys.addaudithook(look)


def strike(order: dict) -> None:
    if order["do"] in ("limit", "tear"):
        limit_files(order["bytes"])
    else:
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}[order["do"]])


def main() -> None:
    """Imports, adopts what killed children leave behind, serves."""
    sys.path.insert(0, str(ROOT))
    for name in (*LAZY, *(f"scripts.{name}" for name in SCRIPTS)):
        importlib.import_module(name)
    sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("colpali")  # 0.4 s, then kept
    gc.collect()
    gc.freeze()
    subreaper = 36
    ctypes.CDLL(None).prctl(subreaper, 1, 0, 0, 0)
    order = serve()
    if order is not None:
        work(order)


if __name__ == "__main__":
    main()
