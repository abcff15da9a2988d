"""SaMer in sentence-transformers, an extra: a token pooling, pipelines of its stock modules, maps after pooling.

    samer.st.save("pipeline", retriever, MergeConfig(num_regions=64))  # the projector in use becomes a Dense
    model = samer.st.load("pipeline")  # the same with the pooling behind it
    scores = model.similarity(model.encode_query(texts), model.encode_document(images))  # ours

`MultiVectorEncoder("pipeline")` gives the trained projection without the pooling, and needs no code of ours.

Shape letters: B images, N tokens per image, P patches per image, K regions, D embedding, M query tokens.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from samer.compressors import make_compressor
from samer.config import InputError, MergeConfig, whole_number
from samer.coords import visual_coords
from samer.retrievers import FAMILIES, Family
from samer.retrievers.colpali import ColPali
from samer.retrievers.colqwen2 import MODEL_MASK, ColQwen2
from samer.retrievers.modernvbert import ColModernVBert
from samer.retrievers.neomme import NeoMME
from samer.runtime.files import exists, listing, trouble, write_json
from samer.tokens import MergedTokens, VisualTokens, regions_of_patches

try:
    from sentence_transformers import MultiVectorEncoder, __version__
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import BaseTokenPooling, MultiVectorMask
except ImportError as error:
    raise ImportError(
        f"samer.st needs sentence-transformers 6.2 or newer: pip install samer[sentence-transformers] ({error})"
    ) from None

POOLING = "samer_pooling"  # the folder beside the stock modules; modules.json does not name it
AT_ONCE = 64  # images merged together where a list of embeddings is pooled
Grid = tuple[int, int]
# Families by the type of their inner model, which is what a pipeline with a Dense of its own runs.
_INNER: dict[str, type[Family]] = {
    "paligemma": ColPali,
    "qwen2_vl": ColQwen2,
    "modernvbert": ColModernVBert,
    "neomme": NeoMME,
}
_WHOLE = (ColPali, ColQwen2)  # whose ForRetrieval class sentence-transformers gives the right prompts


class SamerPooling(BaseTokenPooling):
    """N token vectors of a document to K, by any compressor that needs an image's vectors and places alone.

    Behind a model (`attach`, `load`) the places of tokens are those of the model's family, batch by batch; its raw
    outputs then tell which patch went where (`similarity_map`). Handed to `encode_document(token_pooling=...)` or asked
    with `pool` it sees vectors alone: places need a grid then, and without one vectors merge by direction alone.

    This one's "hpool" reads each row of the distance matrix as a point, as ColPali's pooler does;
    `HierarchicalTokenPooling` of sentence-transformers reads the distances. The two give other vectors.
    """

    def __init__(
        self,
        num_regions: int | str = MergeConfig.num_regions,
        *,
        grid: Sequence[int] | None = None,
        tasks: str | list[str] | None = None,
        **settings: Any,
    ) -> None:
        """Takes the settings of `MergeConfig`.

        Args:
            num_regions: K, or a share of N such as "1/16".
            grid: rows and columns of every image, whose patches come first and row by row; for use without a model.
            tasks: what is pooled, as in `BaseTokenPooling`; documents.
            settings: the others of `MergeConfig`.

        Raises:
            InputError: a setting that is not there, or a compressor that needs more than vectors and places.
        """
        super().__init__(tasks=tasks)
        known = [field.name for field in fields(MergeConfig)]
        strange = [name for name in settings if name not in known]
        if strange:
            raise InputError(f"SamerPooling has no setting {strange[0]!r}; there are {', '.join(known)}, grid, tasks")
        self.merge = MergeConfig(num_regions=num_regions, **settings)
        self.grid = None if grid is None else _as_grid(grid)
        self._compress = make_compressor(self.merge)
        more = self._compress.needs or self._compress.needs_corpus or self._compress.needs_queries
        if more or self.merge.compressor == "random":
            raise InputError(
                f"compressor {self.merge.compressor!r} needs more than an image's vectors (attention, a codebook, "
                "queries or ids), which a token pooling is not given; use samer, hpool, kmeans, grid or none"
            )
        self._family: Family | None = None

    def get_config_dict(self) -> dict[str, Any]:
        """All settings, as `samer_pooling/config.json` holds them."""
        return {**asdict(self.merge), "grid": self.grid and list(self.grid), "tasks": self.tasks}

    def on_model_ready(self, model: MultiVectorEncoder) -> None:
        """Learns the family of the model it stands in, and repairs what sentence-transformers gets wrong there.

        That is ColQwen2: positions of pictures (`retrievers.colqwen2`), and prompt tokens that are no vectors of it.

        Raises:
            InputError: a family whose pictures sentence-transformers can't prepare as they must be.
        """
        self._family = _family_of(model)
        if self._family is not None:
            _repair(model, self._family)

    def forward(self, features: dict[str, Any], task: str | None = None) -> dict[str, Any]:
        """Pools a batch; adds `samer_assignments` (B, N), `samer_source` (B, P) and `samer_grid` (B, 2), all long.

        Raises:
            InputError: where tokens stand is not known: no model, and no `grid`.
        """
        tokens = features["token_embeddings"]
        if not self.applies_to(task) or not len(tokens):
            return features
        mask = features["attention_mask"].bool()
        if self._family is None or "pixel_values" not in features:  # a text has no places
            if self._family is None and self.grid is None:
                raise InputError(
                    "SamerPooling does not know where this model's tokens stand; add it with "
                    "samer.st.attach(model, pooling), or give it grid=(rows, columns)"
                )
            kept = [row[own] for row, own in zip(tokens, mask)]
            grids = [self.grid if self._family is None else (0, 0)] * len(kept)
            merged = self._merged(kept, grids)
        else:
            layout = self._family.layout(features)
            merged = self._compress(
                VisualTokens(tokens, layout.coords, mask, layout.patches, views=layout.views)  # NaN at padding is fine
            )
            features["samer_assignments"] = merged.assignments
            features["samer_source"], features["samer_grid"] = layout.source, layout.grid
        features["token_embeddings"] = merged.tokens.to(tokens.dtype)
        features["attention_mask"] = merged.mask
        return features

    def pool_one(self, embedding: Tensor, grid: Sequence[int] | None = None, **_: Any) -> Tensor:
        """Pools one image's vectors (N, D) to (K, D); see `pool`."""
        return self.pool([embedding], grid=grid)[0]

    def pool(
        self,
        embeddings: list[Tensor] | Tensor,
        *,
        task: str | None = None,
        attention_mask: Tensor | None = None,
        padding_side: str = "right",
        grid: Sequence[int] | Sequence[Sequence[int]] | None = None,
    ) -> list[Tensor] | Tensor:
        """Pools vectors that are there already.

        Args:
            embeddings: (N, D) of unit length each, or all of them as a padded tensor (B, N, D).
            task, attention_mask, padding_side: as in `BaseTokenPooling.pool`; a padded tensor needs its mask.
            grid: rows and columns, of all images or one pair per image; None: as given at first, and without that
                vectors merge by direction alone. Patches come first and row by row, prompt tokens behind them.

        Returns:
            As `BaseTokenPooling.pool`: a list for a list, a tensor padded on `padding_side` for a tensor.

        Raises:
            InputError: a grid of more cells than an image has vectors; a padded tensor without its mask.
        """
        if not self.applies_to(task) or not len(embeddings):
            return embeddings
        if isinstance(embeddings, Tensor):
            if attention_mask is None or embeddings.dim() != 3:
                raise InputError(
                    f"a tensor of vectors is (B, N, D) and needs its attention_mask (B, N); this one is "
                    f"{tuple(embeddings.shape)}. A list of tensors (N, D) needs none"
                )
            kept = [row[own] for row, own in zip(embeddings, attention_mask.bool())]
            rows = self.pool(kept, task=task, grid=grid)
            return pad_sequence(rows, batch_first=True, padding_side=padding_side)
        grids = self._grids(grid, len(embeddings))
        found: list[Tensor] = []
        for first in range(0, len(embeddings), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            merged = self._merged(embeddings[part], grids[part])
            found += [row[own].to(embeddings[0].dtype) for row, own in zip(merged.tokens, merged.mask)]
        return found

    def _grids(self, grid: Any, count: int) -> list[Grid]:
        """One grid per image; (0, 0) for none, which is said once."""
        grid = self.grid if grid is None else grid
        if grid is None:
            if self.merge.compressor == "grid":
                raise InputError("compressor 'grid' pools neighbours, and needs grid=(rows, columns)")
            warnings.warn(
                "SamerPooling was given vectors without a grid: they merge by direction alone, places do not count; "
                "give grid=(rows, columns), or put it behind the model with samer.st.attach",
                stacklevel=3,
            )
            return [(0, 0)] * count
        each = list(grid) if isinstance(grid[0], Sequence) or (isinstance(grid, Tensor) and grid.dim() == 2) else None
        if each is None:
            return [_as_grid(grid)] * count
        if len(each) != count:
            raise InputError(f"{len(each)} grids for {count} images; give one pair for all, or a pair per image")
        return [_as_grid(pair) for pair in each]

    def _merged(self, embeddings: Sequence[Tensor], grids: Sequence[Grid]) -> MergedTokens:
        """Merges a batch of images (N, D) of grids whose cells come first; (0, 0) means places are not known."""
        for number, (rows, grid) in enumerate(zip(embeddings, grids)):
            if rows.dim() != 2 or len(rows) < grid[0] * grid[1]:
                raise InputError(
                    f"embedding {number} of the batch is {tuple(rows.shape)}; a grid of {grid[0]} x {grid[1]} needs "
                    f"(N, D) with {grid[0] * grid[1]} patches first"
                )
        tokens = pad_sequence(list(embeddings), batch_first=True)  # (B, N, D)
        lengths = torch.tensor([len(rows) for rows in embeddings], device=tokens.device)
        cells = torch.tensor([rows * columns for rows, columns in grids], device=tokens.device)
        place = torch.arange(tokens.shape[1], device=tokens.device)
        mask = place < lengths[:, None]  # (B, N)
        patches = torch.where(cells[:, None] > 0, place < cells[:, None], mask)
        coords = torch.full((*mask.shape, 2), 0.5, device=tokens.device)
        for row, (rows, columns) in enumerate(grids):
            if rows:
                coords[row, : rows * columns] = visual_coords(rows, columns).to(coords)
        return self._compress(VisualTokens(tokens, coords, mask, patches))

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Writes `config.json` into a folder."""
        self.save_config(str(output_path))


def _as_grid(pair: Sequence[int]) -> Grid:
    if len(pair) != 2:
        raise InputError(f"a grid is (rows, columns); {pair!r:.80} is none")
    rows, columns = (whole_number("grid", int(value) if isinstance(value, Tensor) else value) for value in pair)
    if rows < 1 or columns < 1:
        raise InputError(f"a grid has at least one row and one column; it is {rows} x {columns}")
    return rows, columns


def _transformer(model: MultiVectorEncoder) -> Transformer:
    found = next((module for module in model if isinstance(module, Transformer)), None)
    if found is None:
        raise InputError("this model has no Transformer of sentence-transformers, so SaMer can't tell its family")
    return found


def _family_of(model: MultiVectorEncoder) -> Family | None:
    """The family of a pipeline's model, whole or without its projection; None: none of ours."""
    transformer = _transformer(model)
    inner, processor = transformer.model, transformer.processor
    whole = FAMILIES.get(type(inner).__name__)
    if whole is not None:
        if not issubclass(whole, _WHOLE):
            raise InputError(
                f"sentence-transformers does not give {whole.architecture} the prompts of its pictures; "
                "write a pipeline that does with samer.st.save"
            )
        return whole(inner, processor)
    kind = _INNER.get(inner.config.model_type)
    if kind is None:
        return None
    config = inner.config if kind is NeoMME else SimpleNamespace(vlm_config=inner.config)
    return kind(SimpleNamespace(config=config, vlm=inner, model=inner), processor)


class _Positions:
    """A hook of a Transformer that adds the positions of pictures to what a ColQwen2 of transformers is given.

    The Transformer calls its model's `forward` past the model's own hooks.
    """

    def __init__(self, family: ColQwen2) -> None:
        self.family = family

    def __call__(self, _: nn.Module, arguments: tuple[dict[str, Any], ...]) -> None:
        features = arguments[0]
        self.family.backbone.rope_deltas = None  # of another batch
        if "image_grid_thw" in features:
            inputs = {**features, MODEL_MASK: features["attention_mask"]}
            features["position_ids"] = self.family.positions(inputs)


def _repair(model: MultiVectorEncoder, family: Family) -> None:
    """Gives a ColQwen2 of transformers the positions of pictures, and leaves the prompt out of its vectors; once."""
    transformer = _transformer(model)
    if not isinstance(family, ColQwen2) or type(transformer.model).__name__ != family.architecture:
        return
    if not any(isinstance(hook, _Positions) for hook in transformer._forward_pre_hooks.values()):
        transformer.register_forward_pre_hook(_Positions(family))
    for module in model:
        if isinstance(module, MultiVectorMask):
            module.keep_only_token_ids = [family.image_token_id]


def attach(model: MultiVectorEncoder, pooling: SamerPooling) -> MultiVectorEncoder:
    """Puts a pooling behind a model of sentence-transformers, and returns the model.

    A ColQwen2 of transformers is repaired with it. Pictures are prepared as the model's own processor does.

    Raises:
        InputError: as `SamerPooling.on_model_ready`, or a model that has a pooling already.
    """
    if any(isinstance(module, BaseTokenPooling) for module in model):
        raise InputError("this model pools its vectors already; load it anew without that, a second pooling compounds")
    pooling.on_model_ready(model)
    model.append(pooling)
    return model


def load(name: str | Path, pooling: SamerPooling | None = None, **options: Any) -> MultiVectorEncoder:
    """Loads a model as `MultiVectorEncoder` does, with pictures prepared as SaMer prepares them, and a pooling behind.

    Args:
        name: a folder that `save` wrote, such a one on the hub, or a ColPali or ColQwen2 of transformers.
        pooling: to put behind it; None: the one that the folder was saved with.
        options: of `MultiVectorEncoder`, such as device, revision, local_files_only.

    Raises:
        InputError: no pooling is given and none is there; as `attach`.
    """
    name = str(name)
    where = {key: options[key] for key in ("revision", "local_files_only") if key in options}
    if pooling is None:
        if SamerPooling.load_file_path(name, "config.json", subfolder=POOLING, **where) is None:
            raise InputError(f"{name} holds no {POOLING}/config.json; give a pooling, such as SamerPooling(64)")
        pooling = SamerPooling.load(name, subfolder=POOLING, **where)
    model = MultiVectorEncoder(name, **options)
    family = _family_of(model)
    if family is not None:
        _prepare_alike(_transformer(model), family, name, where)
    return attach(model, pooling)


def _prepare_alike(transformer: Transformer, family: Family, name: str, where: Mapping[str, Any]) -> None:
    """Exchanges the picture pipeline for the one that SaMer has indexes made with: same backend, same sizes."""
    if type(transformer.model).__name__ == family.architecture:
        pictures = family.load_processor(name, **where).image_processor
    else:
        from transformers import AutoImageProcessor

        pictures = AutoImageProcessor.from_pretrained(name, backend=family.settings["backend"], **where)
    transformer.processor.image_processor = pictures


def dense(projector: Any) -> Dense:
    """A projector as a Dense of sentence-transformers, from hidden states to token vectors, without activation.

    Args:
        projector: a `samer.retrievers.base.Projector`, such as `Retriever.current_projector()`.
    """
    rows, columns = projector.weight.shape
    made = Dense(
        columns,
        rows,
        bias=projector.bias is not None,
        activation_function=None,
        module_input_name="token_embeddings",
    )
    made.linear.load_state_dict(projector.tensors())
    return made


def save(folder: str | Path, retriever: Any, merge: MergeConfig | None = None) -> None:
    """Writes a retriever as a pipeline of stock modules, with the projector that it has in use as its Dense.

    `MultiVectorEncoder(folder)` loads it anywhere, without SaMer and without remote code, and gives all tokens;
    `load(folder)` adds the pooling. Scores are means over a query's tokens, as SaMer's are. A ColQwen2 keeps the
    positions of its pictures there: its processor is Qwen2-VL's, which needs torchvision.

    Args:
        folder: to make; nothing may be there yet.
        retriever: a `samer.retrievers.hf.Retriever`.
        merge: of the pooling; None: as `MergeConfig` has it.

    Raises:
        InputError: a family without a stock pipeline, something at `folder`, a compressor no pooling can be.
    """
    folder, family = Path(folder), retriever.family
    pooling = SamerPooling(**asdict(merge or MergeConfig()))
    if type(family) not in _INNER.values():
        raise InputError(
            f"{type(family).__name__} has no pipeline of stock modules; there is one of "
            f"{', '.join(kind.__name__ for kind in _INNER.values())}"
        )
    if exists(folder) and (folder.is_file() or listing(folder)):
        raise InputError(f"{folder} is there already; name a folder to make")
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        _write(temporary, retriever, pooling)
        temporary.rename(folder)
    except OSError as error:
        raise trouble(folder, error, "written") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(folder: Path, retriever: Any, pooling: SamerPooling) -> None:
    """The folder of a pipeline: the inner model and its processor, the modules behind it, and what names them."""
    import transformers

    family, projector = retriever.family, retriever.current_projector()
    family.backbone.save_pretrained(folder)
    _stock_processor(family).save_pretrained(folder)
    output = {"method": "forward", "method_output_name": "last_hidden_state"}
    modalities = {"text": output, "image": output}
    if not isinstance(family, ColPali):
        modalities["message"] = {**output, "format": "structured"}
    about = {
        "transformer_task": "feature-extraction",
        "modality_config": modalities,
        "module_output_name": "token_embeddings",
    }
    if not isinstance(family, ColQwen2):  # whose pipeline of videos has no other; else pixels hang on what is installed
        about["processor_kwargs"] = {"backend": family.settings["backend"]}
    write_json(folder / "sentence_bert_config.json", about)
    keep = [family.image_token_id] if isinstance(family, ColQwen2) else None
    behind = [
        dense(projector),
        MultiVectorMask(keep_only_token_ids=keep),
        Normalize(module_input_name="token_embeddings"),
    ]
    names = [(Transformer, "")] + [(type(module), f"{n}_{type(module).__name__}") for n, module in enumerate(behind, 1)]
    for module, (_, place) in zip(behind, names[1:]):
        (folder / place).mkdir()
        module.save(str(folder / place))
    (folder / POOLING).mkdir()
    pooling.save(str(folder / POOLING))
    rows = [
        {"idx": number, "name": str(number), "path": place, "type": f"{kind.__module__}.{kind.__name__}"}
        for number, (kind, place) in enumerate(names)
    ]
    (folder / "modules.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    versions = {"sentence_transformers": __version__, "transformers": transformers.__version__}
    made = {
        "model_type": "MultiVectorEncoder",
        "similarity_fn_name": "meanmaxsim",
        "prompts": {},
        "default_prompt_name": None,
        "__version__": {**versions, "pytorch": torch.__version__},
        "samer": {"model": retriever.name, "revision": retriever.revision, "projector": projector.hash},
    }
    write_json(folder / "config_sentence_transformers.json", made)


def _stock_processor(family: Family) -> Any:
    """A processor that writes a family's prompts by a chat template, where that is what an inner model needs.

    A ColQwen2Processor pads pictures as Qwen2VLModel does not take them, and names no modality of tokens, without
    which positions are lost; a ColModernVBertProcessor takes no picture without a text.
    """
    import transformers

    given = family.processor
    parts = {"image_processor": given.image_processor, "tokenizer": given.tokenizer}
    if isinstance(family, ColQwen2):
        if not transformers.utils.is_torchvision_available():
            raise InputError("the pipeline of a ColQwen2 needs torchvision, which is not installed; pip install it")
        template = _template(given.visual_prompt_prefix, given.query_prefix, given.query_augmentation_token * 10 + "\n")
        videos = transformers.Qwen2VLVideoProcessor()
        return transformers.Qwen2VLProcessor(**parts, video_processor=videos, chat_template=template)
    if isinstance(family, ColModernVBert):
        template = _template(given.visual_prompt_prefix, given.query_prefix, given.query_augmentation_token * 10)
        return transformers.Idefics3Processor(**parts, image_seq_len=given.image_seq_len, chat_template=template)
    return given


def _template(picture: str, before: str, behind: str) -> str:
    """A chat template: what stands for a picture, and what stands before and behind a text."""
    words = [json.dumps(each) for each in (picture, before, behind)]
    return (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        f"{{{{ {words[0]} }}}}{{% else %}}{{{{ {words[1]} + part['text'] + {words[2]} }}}}"
        "{% endif %}{% endfor %}{% endfor %}"
    )


def similarity_map(query: Tensor, document: Mapping[str, Tensor]) -> Tensor:
    """How similar each query token is to the vector that stands for each patch of a pooled document.

    What `maxsim_similarity_map` of sentence-transformers gives of all vectors; its `render_similarity_map_on_image`
    draws a row of this.

    Args:
        query: (M, D), of `encode_query`.
        document: of `encode_document(..., output_value=None)` of a model with a `SamerPooling` behind it.

    Returns:
        (M, rows, columns) float32; a patch that was dropped has the least similarity of all.

    Raises:
        InputError: a document without what the pooling adds.
    """
    if "samer_assignments" not in document:
        raise InputError(
            "the document does not say which patch went where; take it from encode_document(..., output_value=None) of "
            "a model that samer.st.attach or samer.st.load made"
        )
    rows, columns = document["samer_grid"].tolist()
    source = document["samer_source"][None, : rows * columns]
    region = regions_of_patches(document["samer_assignments"][None], source)[0]  # (P,)
    vectors = F.normalize(document["token_embeddings"].float(), dim=-1)
    products = query.float() @ vectors[region.clamp(min=0)].T  # (M, P)
    dropped = region < 0
    if dropped.any():
        products[:, dropped] = products[:, ~dropped].min()
    return products.view(-1, rows, columns)
