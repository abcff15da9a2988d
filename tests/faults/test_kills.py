"""Killed, told to stop, out of disk, doubled: train, features, cache, index append and compare lose nothing.

Each case runs a whole command in a process of its own (jobs.py), disturbs it, looks at what it left as a reader would,
and runs the same command again to its end: the folder must then hold what an undisturbed run leaves, byte for byte.

SAMER_FAULT_LONG=1: 20 random kills, up to 60 kills at changes of files, 8 stops and 8 full disks for each command, in
place of a few. SAMER_FAULT_LOG: a file that gets one JSON line per group: {"group", "cases", "survived", "bytes_lost",
"recovery" (longest seconds of a run that went on), "seconds"}.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path

import pytest
from jobs import Job, Server, make_jobs, stat_of
from safetensors import safe_open

from samer.features.read import FeatureStore
from samer.index.manifest import to_json
from samer.index.read import Index
from samer.index.verify import verify
from samer.tokens import QueryTokens

LONG = os.environ.get("SAMER_FAULT_LONG") == "1"
NAMES = ("train", "features", "cache", "index append", "compare")
STRAY = re.compile(r"(^|/)(\.[^/]*|[^/]*tmp[^/]*)(/|$)")  # hidden or temporary: no result of a job is
SHARD = re.compile(r"(^|/)((images|texts|queries)-\d+|measured/[^/]+)\.safetensors$")
CHECKPOINT = re.compile(r"(|.*/)checkpoint-(\d+)/")
GOES_ON = "run the same command again to go on"
FULL = re.compile(r"can't be written.*(No space left on device|File too large)|need .* the disk has .* free")
pytestmark = pytest.mark.slow


# --- what a folder holds --------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes]:
    """Bytes of every file below a folder but of what is remembered of times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name == "stamps.json":
            continue
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):  # a writer may be at work
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def strays(folder: Path) -> list[str]:
    """Hidden and temporary files and folders, and empty folders."""
    paths = [path for path in folder.rglob("*") if not path.is_dir() or not any(path.iterdir())]
    return [str(p.relative_to(folder)) for p in paths if p.is_dir() or STRAY.search(str(p.relative_to(folder)))]


def checkpoints(files) -> dict[str, dict[int, set[str]]]:
    """Checkpoints among file names: by place, by number, the files of each."""
    found = {}
    for name in files:
        if match := CHECKPOINT.match(name):
            own = found.setdefault(match[1], {}).setdefault(int(match[2]), set())
            own.add(name[match.end() :])
    return found


def differences(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    """Names of files that differ; of a checkpoint that only one of two runs left, only the last one's count."""
    ours, theirs = checkpoints(expected), checkpoints(found)

    def counts(name: str) -> bool:
        match = CHECKPOINT.match(name)
        if match is None:
            return True
        place, number = match[1], int(match[2])
        both = number in ours.get(place, ()) and number in theirs.get(place, ())
        return both or number == max(ours.get(place, {0: ()}))

    names = sorted(name for name in expected.keys() | found.keys() if counts(name) and not STRAY.search(name))
    return [name for name in names if expected.get(name) != found.get(name)]


def last_checkpoint(folder: Path, expected: dict[str, bytes]) -> int:
    """Number of the newest checkpoint that has every file and its state whole; 0: none."""
    full = checkpoints(expected).get("", {0: ()})
    found = {name: data for name, data in tree(folder).items() if not STRAY.search(name)}
    whole = [0]
    for number, files in checkpoints(found).get("", {}).items():
        with contextlib.suppress(KeyError, ValueError):
            state = json.loads(found[f"checkpoint-{number}/state.json"])
            whole += [number] * (files == full[max(full)] and state["step"] == number)
    return max(whole)


def finished_shards(job: Job) -> dict[str, tuple]:
    """Shards that a run that goes on must leave alone, with what tells a file from one made anew."""
    files = {name for name in tree(job.out) if SHARD.search(name) and not STRAY.search(name)}
    if job.script == "index":  # one that is not in the manifest yet is made anew
        manifest = json.loads((job.out / "manifest.json").read_text())
        files &= {f"images/{entry['file']}" for entry in manifest["splits"]["images"]["images"]}
    stats = {name: (job.out / name).stat() for name in files}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


# --- readers: what each may see at any moment -----------------------------------------------------------------------


class Reader:
    """Looks at a job's folder, as often as asked, and holds it to what the undisturbed run left."""

    def __init__(self, job: Job, expected: dict[str, bytes], base: Path, world: Path) -> None:
        self.job, self.expected, self.base, self.world = job, expected, base, world
        self.seen = 0
        self.looks = {"features": self.features, "cache": self.cache, "index": self.index, "compare": self.compare}
        if job.script == "index":
            self.final = Index(job.out)
            self.rows = self.held(self.final)
            asked = self.final.vectors("images", 5)
            self.query = QueryTokens(asked.tokens[None], asked.mask[None])
            self.right = self.final.search(self.query, "images", len(self.rows))[0]

    def held(self, cache: Index) -> dict[str, bytes]:
        return {
            name: row.numpy().tobytes() + mask.numpy().tobytes()
            for ids, tokens, masks in cache.images("images")
            for name, row, mask in zip(ids, tokens, masks)
        }

    def look(self) -> None:
        self.looks.get(self.job.script, lambda: None)()

    def features(self, folder: Path | None = None, under: str = "") -> None:
        """A store with a manifest opens, every checksum holds, and each of its splits is complete."""
        folder = folder or self.job.out
        if not (folder / "manifest.json").is_file():
            return
        store = FeatureStore(folder, str(self.base))
        assert not (damages := verify(folder).damages), damages
        final = json.loads(self.expected[f"{under}manifest.json"])["splits"]
        # as the store read it: a writer may have replaced the file since
        found = json.loads(json.dumps({split: asdict(entry) for split, entry in store.manifest.splits.items()}))
        assert all(final[split] == entry for split, entry in found.items()), "half a split"

    def compare(self) -> None:
        self.features(self.job.out / "features", "features/")

    def cache(self) -> None:
        """A split is in the manifest when it is complete, not before."""
        if not (self.job.out / "manifest.json").is_file():
            return
        cache = Index(self.job.out)
        final = json.loads(self.expected["manifest.json"])["splits"]
        for split, entry in to_json(cache.manifest)["splits"].items():
            assert final[split] == json.loads(json.dumps(entry)), f"half of {split}"
            for part in (cache.images, cache.queries, cache.assignments):
                assert all(True for _ in part(split))

    def index(self) -> None:
        """Ids are the first of the final ones, never fewer than before; rows and answers are theirs."""
        cache = Index(self.job.out)
        rows = self.held(cache)
        ids = list(self.rows)[: len(rows)]
        assert list(rows) == ids, "ids are no prefix of the final ones"
        assert len(rows) >= self.seen, f"{len(rows)} images where {self.seen} were seen before"
        assert all(rows[name] == self.rows[name] for name in ids), "other tokens than in the final index"
        right = [pair for pair in self.right if pair[0] in rows][:3]
        assert cache.search(self.query, "images", 3) == [right], "a wrong answer"
        self.seen = len(rows)

    @contextlib.contextmanager
    def watching(self):
        """Looks again and again while the block runs, in a thread."""
        wrong, end = [], threading.Event()

        def watch() -> None:
            while not end.wait(0.01) and not wrong:
                try:
                    self.look()
                except Exception as error:
                    wrong.append(f"a reader saw {type(error).__name__}: {error}")

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()
        assert not wrong, wrong[0]


def halves(job: Job, expected: dict[str, bytes]) -> list[str]:
    """Files under their final name that are not what the undisturbed run wrote; a best/ so far need only be whole."""
    wrong = []
    for name, data in tree(job.out).items():
        if STRAY.search(name) or CHECKPOINT.match(name) or name == "manifest.json" or name == "features/manifest.json":
            continue
        if name.startswith("best/"):
            try:
                json.loads(data) if name.endswith(".json") else safe_open(job.out / name, "pt").keys()
            except Exception as error:
                wrong.append(f"{name}: {error}")
        elif data != expected.get(name):
            wrong.append(f"{name}: {len(data)} bytes, not those of the undisturbed run")
    return wrong


# --- the bench ------------------------------------------------------------------------------------------------------


class Cases:
    """What came of a group's cases, for the log; defects are told at the end."""

    def __init__(self, group: str) -> None:
        self.group, self.started = group, time.monotonic()
        self.count = self.survived = self.lost = 0
        self.recovery, self.defects = 0.0, []

    @contextlib.contextmanager
    def case(self, *moments):
        """One folder's story; each of its moments counts that is not taken off the list."""
        struck = list(moments)
        try:
            yield struck
            self.survived += len(struck)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            words = f"{type(error).__name__}, {Path(place.filename).name}:{place.lineno}: {str(error)[:1500]}"
            self.defects.append(f"{moments}: {words}")
        finally:
            self.count += len(struck)

    def close(self) -> None:
        row = {"group": self.group, "cases": self.count, "survived": self.survived, "bytes_lost": self.lost}
        row |= {"recovery": round(self.recovery, 2), "seconds": round(time.monotonic() - self.started, 2)}
        if os.environ.get("SAMER_FAULT_LOG"):
            with open(os.environ["SAMER_FAULT_LOG"], "a") as log:
                log.write(json.dumps(row) + "\n")
        lines = "\n\n".join(self.defects[:6])
        assert not self.defects, f"{self.group}: {len(self.defects)} of {self.count} cases failed\n{lines}"
        assert self.count > 0
        assert self.lost == 0


class Bench:
    """The server, the jobs, and what an undisturbed run of each leaves and takes."""

    def __init__(self, root: Path, base: Path, world: Path) -> None:
        self.base, self.world = base, world
        self.server = Server()
        self.jobs = make_jobs(root, base, world, self.server)
        self.undisturbed: dict[str, tuple[dict[str, bytes], dict]] = {}
        self.readers: dict[str, Reader] = {}

    def reference(self, name: str) -> tuple[dict[str, bytes], dict]:
        """The files of an undisturbed run, and what the server told of it."""
        if name not in self.undisturbed:
            job = self.fresh(name)
            told = self.server.run(job)
            assert told["code"] == 0, told["stderr"][-2000:]
            assert not strays(job.out)
            self.undisturbed[name] = tree(job.out), told
            self.readers[name] = Reader(job, tree(job.out), self.base, self.world)
        return self.undisturbed[name]

    def fresh(self, name: str) -> Job:
        """The job, its folder as it is before the first run."""
        job = self.jobs[name]
        shutil.rmtree(job.out, ignore_errors=True)
        for file, data in job.seed.items():
            (job.out / file).parent.mkdir(parents=True, exist_ok=True)
            (job.out / file).write_bytes(data)
        if name in self.readers:
            self.readers[name].seen = 0
        return job

    def moments(self, name: str, count: int, kind: str):
        """Moments by chance, the same for the same name and kind: times, and numbers of changes of files.

        Three times of four lie after the first change of a file, the others anywhere.
        """
        _, told = self.reference(name)
        rng = random.Random(f"{name} {kind}")
        writing = told["seconds"] - told["first"]
        times = [
            {"delay": rng.uniform(0.02, told["seconds"])}
            if k % 4 == 3
            else {"delay": rng.uniform(0, writing), "late": True}
            for k in range(count)
        ]
        return rng, times, [rng.randint(1, told["operations"]) for _ in range(count)]

    def stop_at(self, job: Job, moment: dict) -> int:
        """Starts a job and stops it, by SIGSTOP, after {"delay"} seconds or at {"at"} changes of files."""
        if "delay" in moment:
            pid = self.server.start(job, late=moment.get("late", False))
            time.sleep(moment["delay"])
            os.kill(pid, signal.SIGSTOP)
        else:
            pid = self.server.start(job, at=moment["at"], do="stop")
        patience = time.monotonic() + 60
        while stat_of(str(pid))[0] not in "TZ" and time.monotonic() < patience:
            time.sleep(0.002)
        return pid

    def kill(self, job: Job, moment: dict) -> dict:
        """Starts a job and kills it: after {"delay"} seconds, or as the server is told."""
        if "delay" not in moment:
            return self.server.run(job, **moment)
        pid = self.server.start(job, late=moment.get("late", False))
        time.sleep(moment["delay"])
        os.kill(pid, signal.SIGKILL)
        return self.server.wait(pid)

    def check_left(self, job: Job) -> None:
        """What a job left, or had so far: nothing half under its final name, and readers see what they may."""
        expected, _ = self.reference(job.name)
        if wrong := halves(job, expected):
            raise AssertionError(f"half a state: {wrong}")
        self.readers[job.name].look()

    def recover(self, job: Job, cases: Cases, watched: bool = False) -> None:
        """The same command again, to its end: all that was finished is kept, and the result is the undisturbed one."""
        expected, _ = self.reference(job.name)
        shards = finished_shards(job)
        sizes = {name: (job.out / name).stat().st_size for name in shards}
        last = last_checkpoint(job.out, expected)
        done = (job.out / "history.json").exists()
        with self.readers[job.name].watching() if watched else contextlib.nullcontext():
            told = self.server.run(job)
        cases.recovery = max(cases.recovery, told["seconds"])
        found = tree(job.out)
        wrong = differences(expected, found)
        gone = [name for name in shards if found.get(name) != expected[name]]
        cases.lost += sum(len(expected.get(name, found.get(name, b""))) for name in wrong)
        cases.lost += sum(sizes[name] for name in gone if name not in wrong)
        assert told["code"] == 0, f"going on ended with {told['code']}: {told['stderr'][-800:]}"
        assert not wrong, f"not the undisturbed run's: {wrong}"
        assert not (left := strays(job.out)), f"left behind: {left}"
        kept = finished_shards(job)
        assert not (anew := [name for name in shards if kept[name] != shards[name]]), f"made anew: {anew}"
        full = {name for own in checkpoints(expected).values() for files in own.values() for name in files}
        for place, own in checkpoints(found).items():
            assert len(own) <= 3, f"{place}: checkpoints {sorted(own)}"
            assert not (torn := [n for n, files in own.items() if files != full]), f"{place}: torn checkpoints {torn}"
        if job.script == "train" and last and not done:
            said = [
                f"resuming from {job.out}/checkpoint-{last}\n",
                f"{job.out}/checkpoint-{last} is the end of this run",
            ]
            assert any(words in told["stdout"] for words in said), f"not from checkpoint-{last}: {told['stdout']}"
        assert told["left"] == 0, "processes left behind"


@pytest.fixture(scope="module")
def bench(tmp_path_factory, base, world):
    made = Bench(tmp_path_factory.mktemp("jobs"), base, world)
    yield made
    made.server.close()


@contextlib.contextmanager
def group(name: str):
    cases = Cases(name)
    yield cases
    cases.close()


def spread(count: int, most: int) -> list[int]:
    """Up to `most` numbers of 1..count, evenly spaced."""
    steps = min(count, most)
    return sorted({1 + round(k * (count - 1) / max(1, steps - 1)) for k in range(steps)})


# --- killed ---------------------------------------------------------------------------------------------------------


def kill_and_recover(bench: Bench, cases: Cases, name: str, moments: list[dict], watched: bool = False) -> None:
    """Killed at each moment, once again while it goes on from the last, then left to finish."""
    with cases.case(*moments) as struck:
        job = bench.fresh(name)
        for moment in moments:
            while True:
                with bench.readers[name].watching() if watched else contextlib.nullcontext():
                    told = bench.kill(job, moment)
                if told["code"] != 0 or moment.get("delay", 0) < 0.01:
                    break
                bench.fresh(name)  # it was over before: anew, and sooner
                moment = {**moment, "delay": moment["delay"] / 2}
            if told["code"] == 0:
                struck.pop()
            deadly = -signal.SIGXFSZ if moment.get("do") == "tear" else -signal.SIGKILL
            assert told["code"] in (deadly, 0), f"ended with {told['code']}: {told['stderr'][-800:]}"
            assert told["left"] == 0, "processes left behind"
            bench.check_left(job)
        bench.recover(job, cases, watched)


@pytest.mark.parametrize("name", [*NAMES, *(["train, workers"] if LONG else [])])
def test_killed_at_random(bench, name):
    _, moments, _ = bench.moments(name, 32, "killed")
    chains = [[moment] for moment in moments[:20]] + [moments[k : k + 4] for k in range(20, 32, 4)]
    with group(f"SIGKILL, {name}") as cases:
        for number, chain in enumerate(chains if LONG else [moments[:1] if name == "compare" else moments[:3]]):
            kill_and_recover(bench, cases, name, chain, watched=not name.startswith("train") and number % 2 == 0)


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_changes_of_files(bench, name):
    """At every change of a file, or many of them; and in the middle of the write that comes next."""
    rng, _, places = bench.moments(name, 20, "changes")
    expected, told = bench.reference(name)
    largest = max(map(len, expected.values()))
    kills = [{"at": at, "do": "kill"} for at in spread(told["operations"], 60)]
    tears = [{"at": at, "do": "tear", "bytes": int(largest ** rng.random())} for at in places]
    mixed = [rng.choice([*kills, *tears]) for _ in range(12)]
    if LONG:
        chains = [*([m] for m in kills), *([m] for m in tears), *(mixed[k : k + 4] for k in range(0, 12, 4))]
    else:
        chains = [[kills[20], tears[0]]] if name == "compare" else [[kills[5], kills[30], tears[0], tears[1]]]
    with group(f"SIGKILL at changes of files, {name}") as cases:
        for chain in chains:
            kill_and_recover(bench, cases, name, chain)


# --- told to stop ---------------------------------------------------------------------------------------------------


def stop_and_recover(bench: Bench, cases: Cases, name: str, moment: dict, whole_group: bool) -> None:
    """SIGTERM to a process, or to its group: what is at work is finished, 143; then it goes on."""
    with cases.case(moment):
        job = bench.fresh(name)
        pid = bench.stop_at(job, moment)
        shards = finished_shards(job)
        begun = [
            re.sub(r"\.([^/]*\.safetensors)\.[^/]*$", r"\1", path) for path in strays(job.out) if ".safetensors" in path
        ]
        for number in (signal.SIGTERM, signal.SIGCONT):
            (os.killpg if whole_group else os.kill)(pid, number)
        told = bench.server.wait(pid)
        said = told["stderr"]
        at_the_end = told["code"] == -signal.SIGTERM and not differences(bench.reference(name)[0], tree(job.out))
        assert told["code"] in (143, 0) or at_the_end, f"ended with {told['code']}: {said[-800:]}"
        assert told["left"] == 0, "processes left behind"
        assert not re.search("Traceback|Exception|Error", said), said
        if told["code"] == 143:
            assert [line.count(GOES_ON) for line in said.splitlines() if "again" in line] == [1], said
            assert not (left := strays(job.out)) or not job.out.exists(), f"left behind: {left}"
            more = {shard for shard in finished_shards(job).keys() - shards.keys() if ".exact" not in shard}
            # what encodes writes one shard in a thread while the next is encoded, and both are finished
            overlaps = job.script in ("cache", "features", "compare")
            assert len(more) <= (2 if overlaps else 1), f"{len(more)} more shards after SIGTERM"
            assert not (lost := [path for path in begun if not (job.out / path).exists()]), f"not finished: {lost}"
            if job.script == "train":
                assert last_checkpoint(job.out, bench.reference(name)[0]) == told["step"], (
                    f"step {told['step']} was begun, not kept"
                )
        bench.check_left(job)
        bench.recover(job, cases)


@pytest.mark.parametrize("name", [*NAMES, "train, workers"])
def test_told_to_stop(bench, name):
    _, times, places = bench.moments(name, 8, "stopped")
    moments = [*times, *({"at": at} for at in places)]
    middle = {"at": bench.reference(name)[1]["operations"] // 2}  # of training: its workers are at work
    few = {"compare": times[:1], "train, workers": [middle]}.get(name, [times[0], moments[8]])
    with group(f"SIGTERM, {name}") as cases:
        for number, moment in enumerate([middle, *moments] if LONG else few):
            stop_and_recover(bench, cases, name, moment, whole_group=number % 2 == (name != "train, workers"))


# --- a full disk ----------------------------------------------------------------------------------------------------


def check_refusal(job: Job, told: dict) -> None:
    """A run that found the disk full said so in one line that names a file of its folder."""
    said = told["stderr"]
    assert told["code"] in (2, 0), f"ended with {told['code']}: {said[-800:]}"
    assert told["left"] == 0, "processes left behind"
    if told["code"] == 2:
        errors = [line for line in said.splitlines() if line.startswith("error:")]
        assert len(errors) == 1, said
        assert FULL.search(errors[0]), errors[0]
        assert str(job.out) in errors[0], errors[0]
        assert not (left := strays(job.out)) or not job.out.exists(), f"left behind: {left}"
    assert not re.search(r"Traceback|Exception|terminate called", said), said


@pytest.mark.parametrize("name", NAMES)
def test_files_that_may_not_grow(bench, name):
    """No file may grow beyond some bytes, from the start or from some moment on."""
    expected, _ = bench.reference(name)
    rng, _, places = bench.moments(name, 8, "limited")
    largest = max(map(len, expected.values()))
    sizes = [int(largest ** rng.random()) for _ in range(16)]
    moments = [{"at": at, "do": "limit", "bytes": size} for at, size in zip(places, sizes)]
    moments += [{"limit": size} for size in sizes[8:]]
    with group(f"file size limit, {name}") as cases:
        for moment in moments if LONG else moments[:1]:
            with cases.case(moment):
                job = bench.fresh(name)
                check_refusal(job, bench.server.run(job, **moment))
                bench.check_left(job)
                bench.recover(job, cases)


@contextlib.contextmanager
def small_disk(folder: Path, size: int):
    """A file system of its own at a folder, of so many bytes; yields what enlarges it."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = lambda *words: subprocess.run(["mount", *words], capture_output=True, text=True)
    done = mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    if done.returncode:
        pytest.skip(f"a tmpfs can't be mounted here: {done.stderr.strip()}")
    try:
        yield lambda: mount("-o", "remount,size=64m", str(folder))
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("name", NAMES)
def test_full_disk(bench, name):
    """The output folder lies on a file system that is too small, until it is enlarged."""
    expected, _ = bench.reference(name)
    rng, _, _ = bench.moments(name, 0, "full")
    page = 4096
    need = lambda files: sum(page * (1 + -(-len(data) // page)) for data in files.values())
    least = need(bench.jobs[name].seed) + page
    with group(f"full disk, {name}") as cases:
        for _ in range(8 if LONG else 1):
            size = rng.randrange(least, max(least + 8 * page, int(0.9 * need(expected))), page)
            shutil.rmtree(bench.jobs[name].out, ignore_errors=True)
            with cases.case({"disk": size}), small_disk(bench.jobs[name].out.parent, size) as enlarge:
                job = bench.fresh(name)
                check_refusal(job, bench.server.run(job))
                bench.check_left(job)
                enlarge()
                bench.recover(job, cases)


# --- two writers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_two_writers(bench, name):
    """While one writes the other is refused and changes nothing; the first is not disturbed."""
    expected, told = bench.reference(name)
    with group(f"two writers, {name}") as cases:
        for at in spread(told["operations"], 6)[1:5] if LONG else [told["operations"] // 2]:
            with cases.case({"at": at}):
                job = bench.fresh(name)
                first = bench.stop_at(job, {"at": at})
                before = tree(job.out)
                second = bench.server.run(job)
                after = tree(job.out)
                os.kill(first, signal.SIGCONT)
                ended = bench.server.wait(first)
                errors = [line for line in second["stderr"].splitlines() if line.startswith("error:")]
                assert second["code"] == 2, f"the second writer ended with {second['code']}: {second['stderr'][-800:]}"
                assert errors[0].startswith(f"error: {job.out}: another process is writing to it"), errors
                assert len(errors) == 1, errors
                assert "Traceback" not in second["stderr"], second["stderr"]
                assert before == after, f"the second writer changed {differences(before, after)}"
                assert ended["code"] == 0, f"the first writer ended with {ended['code']}: {ended['stderr'][-800:]}"
                assert not (wrong := differences(expected, tree(job.out))), f"not the undisturbed run's: {wrong}"
                assert not (left := strays(job.out)), f"left behind: {left}"
