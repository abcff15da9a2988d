"""Two machines, played by two launches of bash/env.sh on this one, make the index that one process makes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_index_merge import files

ROOT = Path(__file__).resolve().parents[1]
# what bash/cache.sh ends with, of a script whose shards are small enough that both machines have some
LAUNCH = 'source bash/env.sh; PYTHON=$0; launch "$@"'
SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from samer.index import write
from samer.runtime.commands import run
from scripts import cache

write.IMAGES_PER_SHARD, write.QUERIES_PER_SHARD = 2, 7
run(lambda: cache.main(sys.argv[1:]), shared=True)
"""


def started(script, words, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    line = ["bash", "-c", LAUNCH, sys.executable, str(script), *words]
    return subprocess.Popen(
        line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(job):
    try:
        said, _ = job.communicate(timeout=300)
    finally:
        job.kill()
    assert job.returncode == 0, said
    return said


@pytest.mark.slow
@pytest.mark.parametrize("by", ["address", "SLURM"])
def test_two_machines_make_one_index(base, world, tmp_path, by):
    script = tmp_path / "small.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    words = ["--data-root", str(world), "--splits", "val", "test", "--batch-size", "2", f"model.name={base}"]
    words += ["merge.num_regions=6", "--cache-dir"]
    one = started(script, [*words, str(tmp_path / "one")])
    ended(one)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "127.0.0.1,b"}
    jobs = []
    for number in "01":
        node = {"NNODES": "2", "NODE_RANK": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if by == "SLURM":
            node = {**step, "SLURM_NODEID": number, "MASTER_PORT": port}
        jobs.append(started(script, [*words, str(tmp_path / "two")], **node))
    said = [ended(job) for job in jobs]
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert "writing the index to" in said[0]  # the first process speaks
    assert "writing the index to" not in said[1]
