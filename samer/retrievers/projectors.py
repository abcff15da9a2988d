"""Projector files: ours, the released ones, PEFT adapters.

Shape letters: H hidden, D embedding."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from samer.config import InputError, MergeConfig
from samer.retrievers.base import Encoder, Projector
from samer.runtime.files import atomic_path, lookup, read_json, write_json

FORMAT = "samer_projector"
FORMAT_VERSION = 1
LEGACY_FORMAT = "samer_projector_v1"


def save_projector(folder: str | Path, projector: Projector, retriever: Encoder, merge: MergeConfig) -> None:
    """Writes `projector.safetensors` and `config.json`, each atomically, the config last."""
    folder = Path(folder)
    tensors = projector.tensors()
    with atomic_path(folder / "projector.safetensors") as temporary:
        temporary.write_bytes(save(tensors, metadata={"format": FORMAT}))
    write_json(
        folder / "config.json",
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "base_model": retriever.name,
            "base_projector": retriever.base_projector.hash,
            "hidden_size": projector.weight.shape[1],
            "embedding_dim": projector.weight.shape[0],
            "projector": projector.hash,
            "merge": asdict(merge),
        },
    )


def load_projector(path: str | Path, retriever: Encoder) -> Projector:
    """Reads a projector for `retriever`.

    Args:
        path: a folder with `projector.safetensors` + `config.json`, a folder or file `projector.pt` of format
            `samer_projector_v1`, or a PEFT adapter folder that changes `embedding_proj_layer` only.
        retriever: the base it must belong to.

    Raises:
        InputError: nothing readable there, or a projector of another base or size.
    """
    path = lookup(path)
    if path.is_file() and path.suffix == ".safetensors":
        path = path.parent
    if (path / "projector.safetensors").is_file():
        projector = _load_safetensors(path, retriever)
    elif (path / "adapter_config.json").is_file():
        projector = _load_adapter(path, retriever)
    elif path.suffix == ".pt" or (path / "projector.pt").is_file():
        projector = _load_legacy(path if path.suffix == ".pt" else path / "projector.pt")
    else:
        raise InputError(f"{path}: no projector.safetensors, projector.pt or adapter_config.json here")
    expected = tuple(retriever.base_projector.weight.shape)
    if tuple(projector.weight.shape) != expected:
        raise InputError(
            f"{path}: the projector is {tuple(projector.weight.shape)}, but {retriever.name} needs {expected}; "
            "it belongs to another base model"
        )
    return projector


def read_projector(file: Path) -> Projector:
    """The projector in a safetensors file with weight (D, H) and bias (D,).

    Raises:
        InputError: missing, damaged, or something else.
    """
    return _as_projector(_read_tensors(file), file)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: not a readable safetensors file ({str(error)[:120]}); it may be damaged") from None


def _as_projector(tensors: dict, file: Path) -> Projector:
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if not (isinstance(weight, Tensor) and isinstance(bias, Tensor) and weight.dim() == 2 and bias.dim() == 1):
        raise InputError(
            f"{file}: expected a weight (D, H) and a bias (D,); found {sorted(map(str, tensors))}; it is damaged"
        )
    return Projector(weight.float(), bias.float())


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
    if config.get("base_projector") != retriever.base_projector.hash:
        raise InputError(
            f"{folder}: this projector was trained on {config.get('base_model')!r}, not on {retriever.name!r}; "
            "give the same base model"
        )
    return projector


def _load_legacy(file: Path) -> Projector:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except Exception as error:  # torch raises many types for foreign or hostile bytes
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{file}: not a {LEGACY_FORMAT} file that loads without running code ({reason})") from None
    state = content.get("projector_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or content.get("format", LEGACY_FORMAT) != LEGACY_FORMAT:
        raise InputError(f"{file}: not of format {LEGACY_FORMAT} (a dict with projector_state_dict: weight, bias)")
    return _as_projector(state, file)


def _load_adapter(folder: Path, retriever: Encoder) -> Projector:
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise InputError(f"{folder}: a PEFT adapter without adapter_model.safetensors; save it with safetensors")
    tensors = _read_tensors(file)
    foreign = [name for name in tensors if "embedding_proj_layer" not in name]
    if foreign:
        raise InputError(f"{file}: the adapter also changes {foreign[0]}; SaMer adapts embedding_proj_layer only")
    whole = {name.partition("embedding_proj_layer.")[2]: tensor for name, tensor in tensors.items()}
    if set(whole) == {"weight", "bias"}:  # modules_to_save: the layer itself, which PEFT alone does not load
        return _as_projector(whole, file)
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    settings = _lora_settings(folder / "adapter_config.json", tensors)
    base = nn.Module()
    base.embedding_proj_layer = nn.Linear(retriever.hidden_size, retriever.embedding_dim)
    with torch.no_grad():
        base.embedding_proj_layer.weight.copy_(retriever.base_projector.weight)
        base.embedding_proj_layer.bias.copy_(retriever.base_projector.bias)
    try:
        adapted = get_peft_model(base, LoraConfig(target_modules=["embedding_proj_layer"], **settings))
        set_peft_model_state_dict(adapted, tensors)
        # PEFT only warns of tensors that it misses, and leaves random ones in their place
        strange = sorted(set(get_peft_model_state_dict(adapted, save_embedding_layers=False)) ^ set(tensors))
        if strange:
            raise ValueError(f"{strange[0]} is missing or belongs nowhere")
        merged = adapted.merge_and_unload()
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder}: not an adapter of {retriever.name}'s embedding_proj_layer ({reason})") from None
    layer = merged.embedding_proj_layer
    return Projector(layer.weight.detach().float().clone(), layer.bias.detach().float().clone())


def _lora_settings(file: Path, tensors: dict[str, Tensor]) -> dict:
    """What a LoRA of one layer is made of; the rest of its settings, regular expressions and module names, is not used.

    Raises:
        InputError: no LoRA, a value that cannot be, or a variant that changes the base weights as well.
    """
    found = read_json(file)
    ranks = {len(tensor) for name, tensor in tensors.items() if name.endswith("lora_A.weight") and tensor.ndim == 2}
    if not ranks:
        raise InputError(f"{file.parent}: not an adapter of embedding_proj_layer (no lora_A.weight in its tensors)")
    rank, alpha, bias = found.get("r", 8), found.get("lora_alpha", 8), found.get("bias", "none")
    flags = {name: found.get(name, False) for name in ("use_rslora", "use_dora", "fan_in_fan_out")}
    start = found.get("init_lora_weights", True)  # PiSSA and the like start from changed base weights
    others = ("rank_pattern", "alpha_pattern", "layer_replication", "megatron_config", "corda_config", "eva_config")
    wrong = {
        "peft_type": found.get("peft_type") != "LORA",
        "r": type(rank) is not int or ranks != {rank},
        "lora_alpha": type(alpha) not in (int, float) or not abs(alpha) < 1e6,
        "bias": bias not in ("none", "all", "lora_only") if isinstance(bias, str) else True,
        "target_modules": "embedding_proj_layer" not in str(found.get("target_modules"))[:10_000],
        "init_lora_weights": not (start is None or isinstance(start, bool) or start == "gaussian"),
        **{name: not isinstance(value, bool) for name, value in flags.items()},
        **{name: bool(found.get(name)) for name in others},
    }
    for name, bad in wrong.items():
        if bad:
            shown = str(found.get(name))[:60]
            raise InputError(f"{file}: {name} is {shown}; expected a plain LoRA of embedding_proj_layer")
    return {"r": rank, "lora_alpha": alpha, "bias": bias, **flags}
