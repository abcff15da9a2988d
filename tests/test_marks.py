"""What the tests run on: the CPU, unless -m asks for the mark gpu; what can't run says why."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, asks_for_gpu


@pytest.mark.parametrize(
    ("expression", "asked"),
    [
        *[(text, True) for text in ("gpu", "gpu and not slow", "slow or gpu", "(gpu)")],
        *[(text, False) for text in ("", "not gpu", "slow", "not slow", "slow and not gpu", "not browser", "gpus")],
    ],
)
def test_what_asks_for_a_gpu(expression, asked):
    assert asks_for_gpu(expression) is asked


def test_without_the_mark_no_device_is_seen(request, command):
    if asks_for_gpu(request.config.getoption("markexpr")):
        pytest.skip("-m asks for the device")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not torch.cuda.is_available()
    assert command(sys.executable, "-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])").stdout == "\n"


def test_with_the_mark_devices_stay_and_tests_that_lack_one_say_so():
    """Under a number that no machine has, so that this runs anywhere."""
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "-p", "no:cacheprovider", "tests/test_scoring.py"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "99"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
    assert "needs a CUDA device" in done.stdout
    assert "1 skipped" in done.stdout
