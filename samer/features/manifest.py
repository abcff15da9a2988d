"""What a feature store's manifest says, and the fingerprint of the model that made it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from samer.config import InputError
from samer.runtime.files import file_hash, read_json
from samer.runtime.shards import bare_name, whole_number

FORMAT = "samer_features"
FORMAT_VERSION = 3  # 1 had neither attention nor offsets, 2 no checksum of the manifest
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")


def fingerprint(name: str) -> dict[str, str] | None:
    """Hashes of a model's weight files and of its processor's files, as they lie in a folder or the hub's cache.

    Returns:
        `{"weights": sha256, "processor": sha256}`, or None if the files are not on this machine.
    """
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(name, local_files_only=True, allow_patterns=["*.json", "*.safetensors"]))
        except (LocalEntryNotFoundError, HFValidationError, OSError):
            return None
    index = folder / "model.safetensors.index.json"
    weights = ["model.safetensors"]
    if index.is_file():
        files = read_json(index).get("weight_map", {})
        if not isinstance(files, dict) or not all(isinstance(file, str) and len(file) < 256 for file in files.values()):
            raise InputError(f"{index}: weight_map must map each weight to a file; it may be damaged, restore it")
        weights = sorted(set(files.values()))
    result = {}
    for part, names in (("weights", ["config.json", *weights]), ("processor", PROCESSOR_FILES)):
        digest = hashlib.sha256()
        for file in (folder / name for name in names):
            if file.is_file():
                digest.update(f"{file.name}\n{file_hash(file)}\n".encode())
        result[part] = digest.hexdigest()
    return result


def check_manifest(path: Path, manifest: dict) -> None:
    """Refuses a store's manifest that cannot be true, before anything believes it or opens what it names.

    Raises:
        InputError: names the manifest and what is wrong.
    """

    def check(right: bool, what: str) -> None:
        if not right:
            raise InputError(f"{path}: {what}; it is damaged, compute the features anew")

    dtype = manifest.get("dtype")
    check(isinstance(dtype, str) and dtype in DTYPES, f"dtype {str(dtype)[:40]!r} is unknown")
    for key in ("hidden_size", "grid", "image_token_id"):
        check(whole_number(manifest.get(key), 0 if key == "image_token_id" else 1), f"{key} is missing or no number")
    for key in ("weights", "processor", "base_projector", "base_model", "computed_in"):
        check(isinstance(manifest.get(key), str), f"{key} is missing or no text")
    check(isinstance(manifest.get("splits"), dict), "splits is missing or no mapping")
    for split, entry in manifest["splits"].items():
        check(bare_name(split) and isinstance(entry, dict), f"split {split[:40]!r} is no split")
        for kind in ("images", "texts"):
            check(isinstance(entry.get(kind), list), f"{kind} of {split} are missing or no list")
            for shard in entry[kind]:
                right = isinstance(shard, dict) and bare_name(shard.get("file")) and whole_number(shard.get("count"), 1)
                check(right and isinstance(shard.get("sha256"), str), f"an entry of {split}/{kind} can't be true")
