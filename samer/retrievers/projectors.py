"""Projector files: ours, the released ones, PEFT adapters.

Shape letters: H hidden, D embedding."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from samer.compressors import settings_written
from samer.config import InputError, MergeConfig
from samer.retrievers.base import Encoder, Projector, projector_of
from samer.retrievers.identity import ModelIdentity
from samer.runtime.files import (
    DiskError,
    atomic_path,
    exists,
    is_dir,
    is_file,
    opened,
    read_json,
    trouble,
    write_json,
)
from samer.runtime.hub import is_hub_id, projector_place
from samer.runtime.shards import mapped

FORMAT = "samer_projector"
FORMAT_VERSION = 1
LEGACY_FORMAT = "samer_projector_v1"


def save_projector(folder: str | Path, projector: Projector, retriever: Encoder, merge: MergeConfig) -> None:
    """Writes `projector.safetensors` and `config.json`, each atomically, the config last."""
    folder = Path(folder)
    write_projector(folder / "projector.safetensors", projector, {"format": FORMAT})
    write_json(
        folder / "config.json",
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "base_model": retriever.name,
            "revision": retriever.revision,
            "model": asdict(retriever.identity),
            "base_projector": retriever.base_projector.hash,
            "hidden_size": projector.weight.shape[1],
            "embedding_dim": projector.weight.shape[0],
            "projector": projector.hash,
            "merge": settings_written(merge),
        },
    )


def write_projector(file: Path, projector: Projector, metadata: dict[str, str] | None = None) -> None:
    """Writes weight (D, H) and, where there is one, bias (D,) as a safetensors file that `read_projector` reads."""
    with atomic_path(file) as temporary:
        temporary.write_bytes(save(projector.tensors(), metadata=metadata))


def load_projector(path: str | Path, retriever: Encoder, *, local_files_only: bool = False) -> Projector:
    """Reads a projector for `retriever`.

    Args:
        path: a folder with `projector.safetensors` + `config.json`, a folder or file `projector.pt` of format
            `samer_projector_v1`, a PEFT adapter folder that changes the projection only, or the hub id of one of these.
        retriever: the base it must belong to.
        local_files_only: don't ask the hub.

    Raises:
        InputError: nothing readable there, or a projector of another base or size.
    """
    path = projector_place(path, local_files_only=local_files_only)
    if path.name in ("projector.safetensors", "adapter_model.safetensors") and is_file(path):
        path = path.parent
    if is_file(path / "projector.safetensors"):
        projector = _load_safetensors(path, retriever)
    elif is_file(path / "adapter_config.json"):
        projector = _load_adapter(path, retriever)
    elif path.suffix == ".pt" or is_file(path / "projector.pt"):
        projector = _load_legacy(path if path.suffix == ".pt" else path / "projector.pt", retriever)
    else:
        raise InputError(f"{path}: no projector.safetensors, projector.pt or adapter_config.json here")
    expected = retriever.base_projector
    if projector.weight.shape != expected.weight.shape or (projector.bias is None) != (expected.bias is None):
        raise InputError(
            f"{path}: the projector is {_sizes(projector)}, but {retriever.name} needs {_sizes(expected)}; "
            "it belongs to another base model"
        )
    return projector


def _sizes(projector: Projector) -> str:
    return f"{tuple(projector.weight.shape)} {'without' if projector.bias is None else 'with'} bias"


def read_projector(file: Path) -> Projector:
    """The projector in a safetensors file with weight (D, H) and, where the projection has one, bias (D,).

    Raises:
        InputError: missing, damaged, or something else.
    """
    return _as_projector(_read_tensors(file), file)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        with mapped(file) as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise DiskError(
            f"{file}: not a readable safetensors file (there is no such file); restore it, or make it anew"
        ) from None
    except OSError as error:
        raise trouble(file, error) from None
    except (SafetensorError, ValueError) as error:
        raise DiskError(f"{file}: not a readable safetensors file ({str(error)[:120]}); it may be damaged") from None


def _as_projector(tensors: dict, file: Path) -> Projector:
    weight, bias = tensors.get("weight"), tensors.get("bias")
    right = isinstance(weight, Tensor) and weight.dim() == 2
    if right and bias is not None:
        right = isinstance(bias, Tensor) and bias.shape == weight.shape[:1]
    if not right:
        raise InputError(
            f"{file}: expected a weight (D, H) and a bias (D,) or none; found {sorted(map(str, tensors))}; "
            "it is damaged"
        )
    return Projector(weight.float(), None if bias is None else bias.float())


def _load_safetensors(folder: Path, retriever: Encoder) -> Projector:
    config = read_json(folder / "config.json")
    if config.get("format") != FORMAT or config.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{folder / 'config.json'}: format {config.get('format')!r} version {config.get('format_version')!r} "
            f"is not {FORMAT!r} version {FORMAT_VERSION}; use the SaMer version that wrote it"
        )
    projector = read_projector(folder / "projector.safetensors")
    if projector.hash != config.get("projector"):
        raise InputError(f"{folder / 'projector.safetensors'}: contents differ from config.json's hash; it is damaged")
    trained = _identity_in(config, folder / "config.json")
    if other := trained.difference(retriever.identity):
        raise InputError(
            f"{folder}: this projector was trained on {config.get('base_model')!r}, not on {retriever.name!r} "
            f"({other.replace('_', ' ')} differs); give the same base model"
        )
    return projector


def _identity_in(config: dict, file: Path) -> ModelIdentity:
    """What a projector was trained on; one written before models had an identity knows the projection alone.

    Raises:
        InputError: something else stands there.
    """
    base, known = config.get("base_projector"), config.get("model", {})
    parts = [part.name for part in fields(ModelIdentity)]
    known = {name: known.get(name, "") for name in parts} if isinstance(known, dict) else {"model": None}
    known["base_projector"] = base
    if not base or not all(isinstance(value, str) for value in known.values()):
        raise InputError(f"{file}: model or base_projector is no identity; it is damaged")
    return ModelIdentity(**known)


def _load_legacy(file: Path, retriever: Encoder) -> Projector:
    try:
        with opened(file) as handle:
            content = torch.load(handle, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except OSError as error:
        raise trouble(file, error) from None
    except Exception as error:  # torch raises many types for foreign or hostile bytes
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{file}: not a {LEGACY_FORMAT} file that loads without running code ({reason})") from None
    state = content.get("projector_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or content.get("format", LEGACY_FORMAT) != LEGACY_FORMAT:
        raise InputError(f"{file}: not of format {LEGACY_FORMAT} (a dict with projector_state_dict: weight, bias)")
    base = content.get("base_model_name_or_path")
    if isinstance(base, str) and _other_model(base, retriever.name):
        raise InputError(
            f"{file}: this projector was trained on {base[:80]!r}, not on {retriever.name!r}; give the same base model"
        )
    return _as_projector(state, file)


def _other_model(recorded: str, name: str) -> bool:
    """Whether two names are known to be of different models.

    Two hub ids are if the names after their owners differ, apart from case and the ending "-hf", which marks a
    checkpoint converted to transformers' own format (what looks like an owner may be the folder of a copy elsewhere). A
    folder has no name; it is another model only if its config.json says which it came from (`_name_or_path`), and that
    is another. Its weights are not looked at: a legacy file has no hash of them.
    """
    if is_dir(name):
        came_from = read_json(Path(name) / "config.json").get("_name_or_path") if _has_config(name) else None
        name = came_from if isinstance(came_from, str) else ""
    names = [each.lower().rpartition("/")[2].removesuffix("-hf") for each in (recorded, name)]
    known = all(is_hub_id(each) and not exists(each) for each in (recorded, name))
    return known and names[0] != names[1]


def _has_config(folder: str) -> bool:
    return is_file(Path(folder) / "config.json")


def _load_adapter(folder: Path, retriever: Encoder) -> Projector:
    file, layer = folder / "adapter_model.safetensors", retriever.projection_layer
    if not is_file(file):
        raise InputError(f"{folder}: a PEFT adapter without adapter_model.safetensors; save it with safetensors")
    tensors = _read_tensors(file)
    foreign = [name for name in tensors if f"{layer}." not in name]
    if foreign:
        raise InputError(f"{file}: the adapter also changes {foreign[0]}; SaMer adapts {layer} only")
    whole = {name.partition(f"{layer}.")[2]: tensor for name, tensor in tensors.items()}
    if set(whole) in ({"weight"}, {"weight", "bias"}):  # modules_to_save: the layer itself, which PEFT does not load
        return _as_projector(whole, file)
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    settings = _lora_settings(folder / "adapter_config.json", tensors, layer)
    base = _around(layer, retriever.base_projector)
    try:
        adapted = get_peft_model(base, LoraConfig(target_modules=[layer], **settings))
        set_peft_model_state_dict(adapted, tensors)
        # PEFT only warns of tensors that it misses, and leaves random ones in their place
        strange = sorted(set(get_peft_model_state_dict(adapted, save_embedding_layers=False)) ^ set(tensors))
        if strange:
            raise ValueError(f"{strange[0]} is missing or belongs nowhere")
        merged = adapted.merge_and_unload()
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder}: not an adapter of {retriever.name}'s {layer} ({reason})") from None
    return projector_of(merged.get_submodule(layer))


def _around(layer: str, projector: Projector) -> nn.Module:
    """A module whose `layer`, a dotted name, is a copy of a projection, and that has nothing else."""
    inner: nn.Module = nn.Linear(*projector.weight.shape[::-1], bias=projector.bias is not None)
    inner.load_state_dict(projector.tensors())
    for name in reversed(layer.split(".")):
        outer = nn.Module()
        outer.add_module(name, inner)
        inner = outer
    return inner


def _lora_settings(file: Path, tensors: dict[str, Tensor], layer: str) -> dict:
    """What a LoRA of one layer is made of; the rest of its settings, regular expressions and module names, is not used.

    Raises:
        InputError: no LoRA, a value that cannot be, or a variant that changes the base weights as well.
    """
    found = read_json(file)
    ranks = {len(tensor) for name, tensor in tensors.items() if name.endswith("lora_A.weight") and tensor.ndim == 2}
    if not ranks:
        raise InputError(f"{file.parent}: not an adapter of {layer} (no lora_A.weight in its tensors)")
    rank, alpha, bias = found.get("r", 8), found.get("lora_alpha", 8), found.get("bias", "none")
    flags = {name: found.get(name, False) for name in ("use_rslora", "use_dora", "fan_in_fan_out")}
    start = found.get("init_lora_weights", True)  # PiSSA and the like start from changed base weights
    others = ("rank_pattern", "alpha_pattern", "layer_replication", "megatron_config", "corda_config", "eva_config")
    wrong = {
        "peft_type": found.get("peft_type") != "LORA",
        "r": type(rank) is not int or ranks != {rank},
        "lora_alpha": type(alpha) not in (int, float) or not abs(alpha) < 1e6,
        "bias": bias not in ("none", "all", "lora_only") if isinstance(bias, str) else True,
        "target_modules": layer.rpartition(".")[2] not in str(found.get("target_modules"))[:10_000],
        "init_lora_weights": not (start is None or isinstance(start, bool) or start == "gaussian"),
        **{name: not isinstance(value, bool) for name, value in flags.items()},
        **{name: bool(found.get(name)) for name in others},
    }
    for name, bad in wrong.items():
        if bad:
            shown = str(found.get(name))[:60]
            raise InputError(f"{file}: {name} is {shown}; expected a plain LoRA of {layer}")
    return {"r": rank, "lora_alpha": alpha, "bias": bias, **flags}
