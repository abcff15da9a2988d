"""Trains SEPS as configured.

DIR/seps.yaml                          the settings as resolved
DIR/checkpoint-00002265.safetensors    while it runs, all that it needs to go on: the last two
DIR/config.json, model.safetensors     the model of the best epoch so far, by rSum on the validation split
DIR/history.json                       losses and recalls of every epoch; a finished run has it
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from samer.config import InputError
from samer.data.parts import split_part
from samer.runtime.files import atomic_path, is_file, only_writer, write_json
from samer.runtime.processes import gather_objects, print0, rank
from samer.runtime.signals import stoppable
from samer.seps.data import SplitData, read_split
from samer.seps.model import make_model
from samer.seps.run import SepsRun, best_epoch, result_settings
from samer.seps.settings import SepsConfig
from samer.settings import build_dataclass, load_yaml
from samer.training.checks import check_trackers


def train_seps(config: SepsConfig, device: torch.device) -> Path:
    """Trains, or goes on with, a run.

    Returns:
        The model's folder.

    Raises:
        InputError: bad data, towers that can't be used, a folder that holds another run, a loss that is not finite.
        Stopped: SIGTERM came; a checkpoint of the last step is written.
    """
    with only_writer(config.train.output_dir), stoppable():
        return _train(config, device)


def _train(config: SepsConfig, device: torch.device) -> Path:
    output = Path(config.train.output_dir)
    if not config.data.root:
        raise InputError("data.root is not set; give the data set's folder as data.root=DIR (--data_path DIR)")
    trackers = check_trackers(config.train.report_to)
    _check_output(output, config)
    if is_file(output / "history.json"):
        print0(f"{output} holds this run, finished; nothing is left to train")
        return output
    train, validation = _read(config)
    torch.manual_seed(config.train.seed)
    model, inputs = make_model(config, device, train.records)
    gather_objects(None)  # no process may still be looking for a run in this folder when the first one marks it
    if rank() == 0:
        with atomic_path(output / "seps.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(_plain(asdict(config)), sort_keys=False), encoding="utf-8")
    tracker = _tracker(output, trackers, config) if trackers else None
    run = SepsRun(config, model, inputs, train, validation, tracker)
    run.to_the_end()
    if tracker is not None:
        tracker.end_training()
    if rank() == 0:
        write_json(output / "history.json", {"best_epoch": best_epoch(run.history), "epochs": run.history})
        run.clear()
    gather_objects(None)
    return output


def _read(config: SepsConfig) -> tuple[SplitData, SplitData | None]:
    """To train on, and to pick the epoch by; what picks it is told where that flatters."""
    data, dense = config.data, config.seps.dense != "none"
    train = read_split(data, data.train_split, data.limit_train_images, dense=dense, captions=data.captions)
    if not data.eval_split:
        return train, None
    if split_part(data.eval_split)[0].startswith("test"):
        print0(f"note: the epoch is picked on {data.eval_split}, as released; its figures then flatter")
    if config.seps.dense == "query":
        print0("note: seps.dense=query brings a description of the answer along: its figures are of a leak")
    return train, read_split(data, data.eval_split, data.limit_eval_images, dense=dense)


def _tracker(output: Path, names: list[str], config: SepsConfig) -> Accelerator:
    """What tells the trackers; it does nothing else here."""
    project = ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "logs"))
    tracker = Accelerator(cpu=not torch.cuda.is_available(), log_with=names, project_config=project)
    settings = {
        f"{section}.{key}": str(value) for section, part in asdict(config).items() for key, value in part.items()
    }
    try:
        tracker.init_trackers("seps", settings)
    except Exception as error:  # each tracker has errors of its own
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"train.report_to={config.train.report_to} can't be started ({reason})") from error
    return tracker


def _plain(value: dict) -> dict:
    """Settings as YAML writes them plainly: tuples as lists."""
    return {
        section: {key: list(each) if isinstance(each, tuple) else each for key, each in part.items()}
        for section, part in value.items()
    }


def _check_output(output: Path, config: SepsConfig) -> None:
    """Refuses a folder that holds a run with other settings, or another model."""
    path = output / "seps.yaml"
    if not is_file(path):
        if is_file(output / "config.json"):
            raise InputError(f"{output} holds another model; name another train.output_dir")
        return
    before = result_settings(build_dataclass(SepsConfig, load_yaml(path), str(path)))
    for section, values in result_settings(config).items():
        for key, value in values.items():
            if before[section][key] != value:
                raise InputError(
                    f"{output} holds a run with {section}.{key}={before[section][key]!r}, now {value!r}; name another "
                    "train.output_dir, or remove it to start anew"
                )
