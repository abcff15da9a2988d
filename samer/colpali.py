"""The frozen retriever: load, encode, projector in and out.

Shape letters: B images, N tokens per image, Q queries, M query tokens, H hidden, D embedding.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    ColPaliForRetrieval,
    ColPaliProcessor,
    PretrainedConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.logging import disable_progress_bar

from samer import flickr
from samer.config import InputError, MergeConfig
from samer.coords import visual_coords
from samer.runtime import atomic_path, lookup, read_json, write_json
from samer.tokens import QueryTokens, VisualTokens

# How much attention a patch receives from the patches of its image, by name (METHOD section 7): summed over the rows
# of a layer's attention, mean or max over heads, mean over the middle layers or the last layer alone.
ATTENTION = ("middle_mean", "middle_max", "last")
NO_OFFSET = -1
_BESIDE = ("seeds", "offsets")  # in the inputs for our own use; the model is not given them

FORMAT = "samer_projector"
FORMAT_VERSION = 1
LEGACY_FORMAT = "samer_projector_v1"


@dataclass(frozen=True)
class Projector:
    """Weights of `embedding_proj_layer`: weight (D, H), bias (D,), float32 on the CPU."""

    weight: Tensor
    bias: Tensor

    @property
    def hash(self) -> str:
        """SHA-256 over both tensors; names the projector in an index."""
        digest = hashlib.sha256()
        for tensor in (self.weight, self.bias):
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


class Encoder:
    """What turns images and texts into unit tokens: frozen hidden states, and a projection that can be replaced.

    A subclass says where the hidden states come from: `Retriever` from the backbone, `features.FeatureStore` from disk.
    It is no `nn.Module` on purpose: whatever holds it neither trains it nor saves it.
    """

    def __init__(self, name: str, base: Projector, grid: int, image_token_id: int, device: torch.device | str) -> None:
        self.name = name
        self.source: dict[str, str] = {}  # where hidden states come from, as an index records it
        self.base_projector = base
        self.grid = grid
        self.image_token_id = image_token_id
        self.device = torch.device(device)
        self.projector = nn.Linear(base.weight.shape[1], base.weight.shape[0])
        self.use_projector(base)

    def record_inputs(self, records: Sequence[flickr.ImageRecord]) -> dict[str, Tensor]:
        """What `hidden_states` needs of a batch of images; has `input_ids`, `attention_mask` (B, N), `seeds` (B,)."""
        raise NotImplementedError

    def query_inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What `hidden_states` needs of a batch of queries; has `attention_mask` (B, M) and `offsets` (B, M, 2).

        Offsets are each token's first and last + 1 character in its text, -1 for tokens that are not of the text.
        """
        raise NotImplementedError

    def hidden_states(self, inputs: dict[str, Tensor]) -> Tensor:
        """Last hidden states (B, N, H) without gradient, what the projection is applied to (METHOD section 1)."""
        raise NotImplementedError

    def image_states(self, inputs: dict[str, Tensor], needs: Sequence[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """Hidden states of images (B, N, H), and the attention signals named in `needs`, (B, N) float32 each.

        A signal is 0 at prompt tokens and padding.

        Raises:
            InputError: a signal that is not known, or not there.
        """
        if needs:
            raise InputError(f"{self.name}: no attention signal {needs[0]!r} can be had from this encoder")
        return self.hidden_states(inputs), {}

    @property
    def hidden_size(self) -> int:
        return self.base_projector.weight.shape[1]

    @property
    def embedding_dim(self) -> int:
        return self.base_projector.weight.shape[0]

    def use_projector(self, projector: Projector) -> None:
        """Replaces the projection; it computes in float32 on the model's device.

        Raises:
            InputError: sizes that differ from the base's, or non-finite values.
        """
        expected = self.base_projector.weight.shape
        if projector.weight.shape != expected or projector.bias.shape != expected[:1]:
            raise InputError(
                f"the projector is {tuple(projector.weight.shape)}, but {self.name} needs {tuple(expected)}; "
                "it belongs to another base model"
            )
        if not (torch.isfinite(projector.weight).all() and torch.isfinite(projector.bias).all()):
            raise InputError(f"the projector for {self.name} holds NaN or infinite values; take another checkpoint")
        with torch.no_grad():
            self.projector.weight.copy_(projector.weight)
            self.projector.bias.copy_(projector.bias)
        self.projector.to(self.device).requires_grad_(False)

    def current_projector(self) -> Projector:
        """The projection in use, as float32 copies on the CPU."""
        return Projector(*(t.detach().float().cpu().clone() for t in (self.projector.weight, self.projector.bias)))

    def project(self, hidden: Tensor) -> Tensor:
        """Unit tokens (..., D) in float32 of hidden states (..., H) (METHOD section 1)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.normalize(self.projector(hidden.float()), dim=-1)

    def image_coords(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where each token of an image sequence stands; image positions are found by token id.

        Args:
            input_ids: (B, N).

        Returns:
            coords (B, N, 2): the patch grid in order, prompt tokens at (0.5, 0.5); patches (B, N) bool.

        Raises:
            InputError: an image without exactly grid x grid placeholder tokens.
        """
        patches = input_ids == self.image_token_id
        count = self.grid * self.grid
        if not (patches.sum(1) == count).all():
            raise InputError(
                f"{self.name}: expected {count} image tokens ({self.grid} x {self.grid}) per image, "
                f"got {patches.sum(1).tolist()}; processor and model do not belong together"
            )
        coords = torch.full((*input_ids.shape, 2), 0.5, device=input_ids.device)
        grid = visual_coords(self.grid, self.grid).to(input_ids.device)
        coords[patches] = grid.repeat(len(input_ids), 1)
        return coords, patches

    def encode_images(self, inputs: dict[str, Tensor], needs: Sequence[str] = ()) -> VisualTokens:
        """Images to unit tokens: every output of the fixed grid is kept, patches and prompt (METHOD section 1).

        Args:
            inputs: from `record_inputs`.
            needs: names of attention signals to go with them.
        """
        hidden, attention = self.image_states(inputs, needs)
        coords, patches = self.image_coords(inputs["input_ids"].to(self.device))
        mask = inputs["attention_mask"].bool().to(self.device)
        seeds = inputs["seeds"].to(self.device) if "seeds" in inputs else None
        tokens = self.project(hidden)
        return VisualTokens(tokens, coords, None if bool(mask.all()) else mask, patches, seeds, attention)

    def encode_queries(self, inputs: dict[str, Tensor]) -> QueryTokens:
        """Queries to unit tokens; prompt and augmentation tokens count, padding does not (METHOD section 4)."""
        mask = inputs["attention_mask"].bool().to(self.device)
        return QueryTokens(self.project(self.hidden_states(inputs)), mask, inputs.get("offsets"))


class Retriever(Encoder):
    """A frozen ColPali: images and texts to hidden states, those to unit tokens through a projector."""

    def __init__(self, model: ColPaliForRetrieval, processor: ColPaliProcessor, name: str) -> None:
        self.processor = processor
        self.model = model.eval().requires_grad_(False)
        layer, vision = model.embedding_proj_layer, model.config.vlm_config.vision_config
        super().__init__(
            name,
            Projector(*(t.detach().float().cpu().clone() for t in (layer.weight, layer.bias))),
            vision.image_size // vision.patch_size,
            model.config.vlm_config.image_token_id,
            model.device,
        )
        self.source = {"computed_in": str(model.dtype).removeprefix("torch."), "stored_in": "nothing"}
        ours, theirs = self.image_token_id, processor.image_token_id
        if ours != theirs:
            raise InputError(
                f"{name}: the model's image token is {ours}, the processor's {theirs}; "
                "they belong to different checkpoints"
            )

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        local_files_only: bool = False,
    ) -> Retriever:
        """Loads a ColPali in transformers format, e.g. `vidore/colpali-v1.3-hf`, or a folder.

        Raises:
            InputError: not found, another architecture, or weights that the checkpoint does not hold.
        """
        if not sys.stderr.isatty():
            disable_progress_bar()  # its bar would fill a log file
        try:
            kind = PretrainedConfig.get_config_dict(name, local_files_only=local_files_only)[0].get("model_type")
            if kind != "colpali":  # transformers would build a random model of the default size, gigabytes, first
                raise ValueError(f"its config.json is of model type {kind!r}, not 'colpali'")
            model, report = ColPaliForRetrieval.from_pretrained(
                name,
                # float32 from the start: halves cast up would keep Gemma's embedding scale rounded
                dtype=torch.float32 if dtype == torch.float32 else "auto",
                attn_implementation="sdpa",  # else a config could name a kernel to fetch from the hub
                use_safetensors=True,  # never a pickle
                local_files_only=local_files_only,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they come out in the report, and are refused by name below
            )
            processor = ColPaliProcessor.from_pretrained(name, local_files_only=local_files_only)
        except Exception as error:  # many types, bare ones from tokenizers
            reason = " ".join(str(error).split())[:240]
            raise InputError(
                f"model {name!r} can't be loaded ({reason}); name a ColPali in transformers format, such as "
                "vidore/colpali-v1.3-hf, or a folder that holds one"
            ) from None
        lost = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
        if lost:
            raise InputError(
                f"model {name!r} lacks {len(lost)} weights or has them in another size, first {lost[0]}; "
                "they would be random. "
                "Use a checkpoint made for this transformers version"
            )
        model.vlm.to(dtype)  # the projection keeps its stored values, so its hash does not depend on dtype
        return cls(model.to(device), processor, name)

    def record_inputs(self, records: Sequence[flickr.ImageRecord]) -> dict[str, Tensor]:
        """Loads and prepares a batch of images, everything the model needs."""
        inputs = self.image_inputs([flickr.load_image(record.image_path) for record in records])
        return {**inputs, "seeds": image_seeds(records)}

    def image_inputs(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Everything the model needs of a batch of RGB images; labels, which retrieval has no use for, are left out."""
        inputs = self.processor(images=list(images))
        return {name: value for name, value in inputs.items() if name != "labels"}

    def query_inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Everything the model needs of a batch of queries, and `offsets`."""
        if isinstance(texts, str):
            raise InputError("query_inputs takes a list of texts; a single text would be read letter by letter")
        marked = [text for text in texts if self.processor.image_token in text]
        if marked:
            raise InputError(f"query {marked[0][:80]!r} holds {self.processor.image_token}, which stands for an image")
        inputs = dict(self.processor(text=list(texts), return_offsets_mapping=True))
        # the processor writes <bos>, a prefix, the text, augmentation tokens
        before = len(self.processor.tokenizer.bos_token) + len(self.processor.query_prefix)
        lengths = torch.tensor([len(text) for text in texts])
        offsets = inputs.pop("offset_mapping") - before  # (B, M, 2)
        first, last = offsets.clamp(min=0).minimum(lengths[:, None, None]).unbind(-1)
        inputs["offsets"] = torch.where((first < last)[..., None], torch.stack([first, last], -1), NO_OFFSET)
        return inputs

    @torch.no_grad()
    def hidden_states(self, inputs: dict[str, Tensor]) -> Tensor:
        """Last hidden states, what the projection is applied to (METHOD section 1).

        Args:
            inputs: from `image_inputs` or `query_inputs`, forwarded whole (`token_type_ids` keeps attention full).

        Returns:
            (B, N, H) in the model's dtype, without gradient.

        Raises:
            InputError: a non-finite value at a valid position.
        """
        inputs = {name: value.to(self.device) for name, value in inputs.items() if name not in _BESIDE}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        hidden = self.model.vlm(**inputs, use_cache=False).last_hidden_state
        # padding may hold anything (a fully masked row is NaN); valid positions may not
        hidden = torch.where(inputs["attention_mask"].bool()[..., None], hidden, 0)
        if not torch.isfinite(hidden.sum()):
            rows = (~torch.isfinite(hidden.float().sum((1, 2)))).nonzero()
            if len(rows):
                raise InputError(
                    f"{self.name} gave NaN or infinite features for item {int(rows[0])} of a batch; "
                    "use bfloat16 or float32 instead of float16"
                )
        return hidden

    def image_states(self, inputs: dict[str, Tensor], needs: Sequence[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Encoder.image_states`; attention is read layer by layer, an image at a time, and never kept."""
        if not needs:
            return self.hidden_states(inputs), {}
        check_signals(needs)
        if "token_type_ids" not in inputs:  # the model would turn causal without a mask that says so
            raise InputError("attention signals need all that the processor returns, token_type_ids too")
        patches = (inputs["input_ids"] == self.image_token_id).to(self.device)  # padding holds another id
        layers = self.model.vlm.language_model.layers
        with column_sums(self.model.vlm.language_model, signal_layers(len(layers)), patches) as sums:
            hidden = self.hidden_states(inputs)
        *middle, last = (sums[layer] for layer in signal_layers(len(layers)))
        signals = {
            "middle_mean": torch.stack([columns.mean(1) for columns in middle]).mean(0),
            "middle_max": torch.stack([columns.amax(1) for columns in middle]).mean(0),
            "last": last.mean(1),
        }
        return hidden, {name: signals[name] for name in needs}


def image_seeds(records: Sequence[flickr.ImageRecord]) -> Tensor:
    """A number per image, (B,) long, that depends on its id alone."""
    digests = [hashlib.sha256(record.image_id.encode()).digest() for record in records]
    return torch.tensor([int.from_bytes(digest[:8], "little", signed=True) for digest in digests])


def signal_layers(count: int) -> list[int]:
    """Layers whose attention is read, of a language model with `count`: floor(0.4 L)..floor(0.6 L), then the last."""
    return [*range(int(count * 2 // 5), min(int(count * 3 // 5), count - 1) + 1), count - 1]


def check_signals(needs: Sequence[str]) -> None:
    """Refuses a name that is not in `ATTENTION`."""
    unknown = [name for name in needs if name not in ATTENTION]
    if unknown:
        raise InputError(f"attention signal {unknown[0]!r} is unknown; there are {', '.join(ATTENTION)}")


_COLUMNS = "samer_columns"  # an attention of transformers' registry: sdpa, and a look at the chosen layers


def _columns_attention(module, query, key, value, attention_mask, **kwargs):
    """sdpa as transformers computes it; where a layer carries a reader, it sees queries, keys and mask before."""
    reader = getattr(module, "samer_reader", None)
    if reader is not None:
        reader(query, key, attention_mask, kwargs.get("scaling"))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(_COLUMNS, _columns_attention)
AttentionMaskInterface.register(_COLUMNS, sdpa_mask)


@contextmanager
def column_sums(language_model: nn.Module, layers: Sequence[int], patches: Tensor):
    """Within the block, a forward pass leaves the column sums of patch-to-patch attention of `layers`.

    What flows through the model is what sdpa computes; probabilities are computed beside it, in float32, for one image
    and layer at a time (heads x N x N), summed over the patches' rows and dropped.

    Args:
        language_model: whose `layers[k].self_attn` are read.
        layers: their numbers; one may stand twice.
        patches: (B, N) bool.

    Yields:
        A dict, layer -> (B, heads, N) float32, 0 at columns that are no patch; filled by the forward pass.
    """
    sums: dict[int, Tensor] = {}

    def reader_of(layer: int):
        def read(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> None:
            # query (B, heads, N, d), key (B, key heads, N, d); mask (B or 1, 1, N, N), bool or added; None: full
            groups = query.shape[1] // key.shape[1]
            scale = scaling if scaling is not None else query.shape[-1] ** -0.5
            columns = torch.zeros(query.shape[:3], device=query.device)
            for image in range(len(query)):
                own = patches[image]
                keys = key[image].float().repeat_interleave(groups, dim=0)
                logits = query[image][:, own].float() @ keys.transpose(1, 2) * scale  # (heads, patches, N)
                if mask is not None:
                    rule = mask[min(image, len(mask) - 1)][:, own]  # (1, patches, N)
                    logits = logits.masked_fill(~rule, float("-inf")) if rule.dtype == torch.bool else logits + rule
                columns[image] = logits.softmax(-1).sum(1) * own
            sums[layer] = columns

        return read

    attentions = {layer: language_model.layers[layer].self_attn for layer in layers}
    config = language_model.config
    before = config._attn_implementation
    config._attn_implementation = _COLUMNS
    for layer, attention in attentions.items():
        attention.samer_reader = reader_of(layer)
    try:
        yield sums
    finally:
        config._attn_implementation = before
        for attention in attentions.values():
            del attention.samer_reader


def save_projector(folder: str | Path, projector: Projector, retriever: Encoder, merge: MergeConfig) -> None:
    """Writes `projector.safetensors` and `config.json`, each atomically, the config last."""
    folder = Path(folder)
    tensors = {"weight": projector.weight.contiguous(), "bias": projector.bias.contiguous()}
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
