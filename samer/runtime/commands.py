"""What every command shares: options, devices, signals and the exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from samer.config import Config, InputError, load_config
from samer.runtime.files import read_json
from samer.runtime.hub import projector_place
from samer.runtime.processes import world_size
from samer.runtime.signals import Stopped, listening


def pick_device(name: str | None = None) -> torch.device:
    """The device to compute on: as named, else this process's GPU, else the CPU.

    Raises:
        InputError: a name that torch does not know or that is not there.
    """
    if name in (None, "", "auto"):
        return (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} can't be used here ({str(error).splitlines()[0][:120]})") from None
    return device


def add_compute_options(parser: argparse.ArgumentParser) -> None:
    """Adds --device and --threads, which `compute_device` reads."""
    parser.add_argument("--device", default="auto", help="e.g. cpu, cuda:0; default: a GPU if there is one")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all, or OMP_NUM_THREADS)")


def compute_device(options: argparse.Namespace) -> torch.device:
    """The device that the options ask for, with the threads they ask for.

    Raises:
        InputError: a device that is not there, or less than one thread.
    """
    if options.threads is not None:
        if options.threads < 1:
            raise InputError(f"--threads is {options.threads}; it must be at least 1")
        torch.set_num_threads(options.threads)
    return pick_device(options.device)


def adapter_config(adapter_path: str, config_path: str | None, overrides: Sequence[str]) -> Config:
    """Settings of a trained projector: from the config file if given, else from its config.json; overrides win.

    Args:
        adapter_path: a projector's folder or file, or the hub id of one (owner/name); empty: none.
        config_path: a YAML file, or None.
        overrides: `section.key=value`.

    Raises:
        InputError: no projector there, or one that says nothing of its model and merge.
    """
    config = load_config(config_path, overrides)
    if not adapter_path:
        return config
    folder = projector_place(adapter_path, local_files_only=config.model.local_files_only)
    if folder.name == "projector.safetensors":  # what it was trained for stands beside it
        folder = folder.parent
    if config_path or not (folder / "projector.safetensors").is_file():
        return config
    trained = read_json(folder / "config.json")
    name, merge = trained.get("base_model"), trained.get("merge")
    if not (isinstance(name, str) and isinstance(merge, dict)):
        raise InputError(f"{adapter_path}/config.json: no base_model or no merge settings; give --config")
    about = {"model.name": name, "model.revision": trained.get("revision", "main")}
    about |= {f"merge.{key}": value for key, value in merge.items()}
    return load_config(None, [*(f"{key}={value}" for key, value in about.items()), *overrides])


def split_words(parser: argparse.ArgumentParser, splits: Sequence[str], overrides: Sequence[str]):
    """Splits and overrides told apart: section.key=value right after --splits is taken for a split by argparse.

    Returns:
        (split names, overrides); no split left is a usage error.
    """
    names = [word for word in splits if "=" not in word]
    if not names:
        parser.error("argument --splits: expected at least one split")
    return names, [*(word for word in splits if "=" in word), *overrides]


def run(main: Callable[[], Any], *, shared: bool = False) -> None:
    """Runs an entry point: bad input prints one line and exits with 2, SIGINT exits with 130, SIGTERM with 143.

    Args:
        main: the entry point.
        shared: whether it shares its work between the processes of a job; otherwise several processes are bad input.
    """
    try:
        with listening():
            if world_size() > 1 and not shared:
                raise InputError(
                    f"this command runs in one process, and WORLD_SIZE is {world_size()}; start it without torchrun "
                    "(unset WORLD_SIZE): only train, features and cache share their work between processes"
                )
            main()
    except Stopped:
        print("stopped; run the same command again to go on", file=sys.stderr, flush=True)
        raise
    except InputError as error:
        # a data loader's worker hands its whole traceback over as the message, the error's own words at its end
        words = str(error).rpartition(f"{InputError.__module__}.{InputError.__qualname__}: ")[2]
        print("error:", " ".join(words.split()), file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr, flush=True)
        sys.exit(130)
