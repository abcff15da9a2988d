"""Ray Data as the engine that makes an index: jobs are read by its tasks, and encoded by an actor per GPU.

Retries, back-pressure and placing are Ray's. What is read of a job goes through Ray's object store, so a worker that is
lost costs the chunks that it had in hand, and what it has finished is on disk. A cluster that runs is joined where
RAY_ADDRESS names it (or `ray start` ran here); else one is started on this machine, for this run.
"""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from samer.config import InputError
from samer.data.sources import Job
from samer.index.bulk import Chunk, Done, Opened, Task, Worker, chunks_of
from samer.runtime.processes import print0
from samer.runtime.signals import stop_here

READING = 0.25  # of a CPU: reading waits for disks and networks


class OnRay:
    """The engine that is a Ray cluster; closes what it started when it is left."""

    def __init__(self, workers: int | None = None) -> None:
        """`workers`: actors that encode; None: one a GPU, or without GPUs one for four CPUs.

        Raises:
            InputError: less than one.
        """
        if workers is not None and workers < 1:
            raise InputError(f"--workers is {workers}; it must be at least 1")
        self.workers = workers

    def __enter__(self) -> OnRay:
        """Joins or starts the cluster.

        Raises:
            InputError: no Ray, none that answers, or fewer GPUs or CPUs than workers.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        try:
            import pandas  # noqa: F401, which Ray Data takes for granted
            import ray
        except ModuleNotFoundError as error:
            raise InputError(f"--engine ray needs {error.name}; install it: pip install 'samer[ray]'") from None
        self.ray = ray
        heard = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
        try:
            if os.environ.get("RAY_ADDRESS"):
                ray.init(**quiet)
            else:  # one CPU more than there are, so that reading never waits for encoding
                cpus = max(os.cpu_count() or 1, self.workers or 1) + 1
                _let_import()
                ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            words = " ".join(str(error).split())[:200]
            raise InputError(f"Ray does not start, or answer ({words}); RAY_ADDRESS says which cluster") from None
        for number, handler in heard.items():
            signal.signal(number, handler)
        there = ray.cluster_resources()
        gpus, cpus = int(there.get("GPU", 0)), int(there.get("CPU", 1))
        self.workers = self.workers or gpus or max(1, (cpus - 1) // 4)
        most = gpus or max(1, cpus - 1)
        if self.workers > most:
            ray.shutdown()
            raise InputError(
                f"--workers is {self.workers}; the cluster has {most} {'GPUs' if gpus else 'CPUs'} for them"
            )
        self.needs = {"num_gpus": 1, "num_cpus": 1} if gpus else {"num_cpus": max(1, (cpus - 1) // self.workers)}
        print0(f"Ray: {len(ray.nodes())} machines, {gpus} GPUs, {cpus} CPUs; {self.workers} workers")
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the cluster; one that was started here ends."""
        with suppress(Exception):
            self.ray.shutdown()

    def _own(self, task: Task) -> Task:
        """The task with this worker's share of a machine's threads."""
        return replace(task, threads=task.threads or (None if "num_gpus" in self.needs else self.needs["num_cpus"]))

    def open(self, task: Task) -> Opened:
        """As `Engine.open`: a worker is asked, as the model may compute otherwise here.

        Raises:
            InputError: as `Worker`.
        """
        opener = self.ray.remote(**self.needs)(_opened)
        found = self._got(opener.remote(self._own(task)))
        if isinstance(found, str):
            raise InputError(found)
        return found

    def _got(self, reference: Any) -> Any:
        """What a remote function returned, waited for so that a signal is heard."""
        while True:
            stop_here()
            ready, _ = self.ray.wait([reference], timeout=1)
            if ready:
                with self._told():
                    return self.ray.get(reference)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What Ray says of machines that lack SaMer, in one line."""
        try:
            yield
        except self.ray.exceptions.RayError as error:
            if "No module named 'samer'" not in str(error):
                raise
            raise InputError(
                "SaMer is not installed on the cluster's machines; install it there as it is here"
            ) from None

    def run(self, task: Task, jobs: Sequence[Job]) -> Iterator[Done]:
        """As `Engine.run`; in the order in which chunks are finished.

        Raises:
            InputError: of a worker; the others are stopped.
        """
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.execution_options.preserve_order = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        task = self._own(task)
        rows = [{"job": json.dumps(asdict(job))} for job in jobs]
        read = {"batch_size": 1, "batch_format": "pyarrow", "num_cpus": READING, "fn_args": (task,)}
        made = {"batch_size": 1, "batch_format": "pyarrow", "concurrency": self.workers, **self.needs}
        found = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(_read, **read)
        found = found.map_batches(_Encoder, fn_constructor_args=(task,), **made)
        for row in found.iter_rows():
            stop_here()
            if row["error"]:
                raise InputError(row["error"])
            yield Done(**json.loads(row["done"]))


def _let_import() -> None:
    """Workers on this machine import the SaMer that runs, from wherever it was started."""
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def _opened(task: Task) -> Opened | str:
    try:
        return Worker(task).opened
    except InputError as error:
        return str(error)


def _read(batch: Any, task: Task) -> Iterator[Any]:
    """Chunks of the job in a batch, a table of one row each; files are large binaries, as many make gigabytes."""
    import pyarrow as pa

    kinds = {
        "facts": pa.string(),
        "files": pa.large_list(pa.large_binary()),
        "error": pa.string(),
    }
    schema = pa.schema(list(kinds.items()))
    for text in batch.column("job").to_pylist():
        about = json.loads(text)
        job = Job(**{**about, "names": tuple(about["names"])})
        try:
            for chunk in chunks_of(task, job):
                facts = {**asdict(replace(chunk, files=[])), "files": []}
                row = {"facts": json.dumps(facts), "files": chunk.files, "error": ""}
                yield pa.Table.from_pylist([row], schema=schema)
        except InputError as error:
            yield pa.Table.from_pylist([{"facts": "", "files": [], "error": str(error)}], schema=schema)


class _Encoder:
    """The actor: a worker that is opened once."""

    def __init__(self, task: Task) -> None:
        self.worker, self.error = None, ""
        try:
            self.worker = Worker(task)
        except InputError as error:
            self.error = str(error)

    def __call__(self, batch: Any) -> Iterator[Any]:
        """What came of each chunk of a batch, or why the work must stop."""
        import pyarrow as pa

        schema = pa.schema([("done", pa.string()), ("error", pa.string())])
        for row in batch.to_pylist():
            done, error = "", self.error or row["error"]
            if not error:
                try:
                    chunk = Chunk(**{**json.loads(row["facts"]), "files": row["files"]})
                    done = json.dumps(asdict(self.worker.encode(chunk)))
                except InputError as refused:
                    error = str(refused)
            yield pa.Table.from_pylist([{"done": done, "error": error}], schema=schema)
