"""Models of sentence-transformers with the pooling behind them, and retrievers written as pipelines of its modules."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sentence_transformers
import torch
import transformers
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import BaseTokenPooling, MultiVectorMask

from samer.config import InputError, MergeConfig
from samer.retrievers import Family
from samer.retrievers.base import Projector
from samer.retrievers.colpali import ColPali
from samer.retrievers.colqwen2 import ColQwen2
from samer.retrievers.hf import Retriever
from samer.retrievers.modernvbert import ColModernVBert
from samer.runtime.files import exists, is_file, listing, trouble, write_json
from samer.st.families import INNER, family_of, transformer_of
from samer.st.pooling import SamerPooling

POOLING = "samer_pooling"  # the folder beside the stock modules; modules.json does not name it


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
    family = family_of(model)
    if family is not None:
        _prepare_alike(transformer_of(model), family, name, where)
    return attach(model, pooling)


def _prepare_alike(transformer: Transformer, family: Family, name: str, where: Mapping[str, Any]) -> None:
    """Exchanges the picture pipeline for the one that SaMer has indexes made with: same backend, same sizes."""
    if type(transformer.model).__name__ == family.architecture:
        pictures = family.load_processor(name, **where).image_processor
    else:
        pictures = transformers.AutoImageProcessor.from_pretrained(name, backend=family.settings["backend"], **where)
    transformer.processor.image_processor = pictures


def dense(projector: Projector) -> Dense:
    """A projector as a Dense of sentence-transformers, from hidden states to token vectors, without activation.

    Args:
        projector: such as `Retriever.current_projector()`.
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


def save(folder: str | Path, retriever: Retriever, merge: MergeConfig | None = None) -> None:
    """Writes a retriever as a pipeline of stock modules, with the projector that it has in use as its Dense.

    `MultiVectorEncoder(folder)` loads it anywhere, without SaMer and without remote code, and gives all tokens;
    `load(folder)` adds the pooling. Scores are means over a query's tokens, as SaMer's are. A ColQwen2 keeps the
    positions of its pictures there: its processor is Qwen2-VL's, which needs torchvision.

    Args:
        folder: to make; nothing may be there yet.
        retriever: whose model is saved whole, in its dtype.
        merge: of the pooling; None: as `MergeConfig` has it.

    Raises:
        InputError: a family without a stock pipeline, something at `folder`, a compressor no pooling can be.
    """
    folder, family = Path(folder), retriever.family
    pooling = SamerPooling(**asdict(merge or MergeConfig()))
    if type(family) not in INNER.values():
        raise InputError(
            f"{type(family).__name__} has no pipeline of stock modules; there is one of "
            f"{', '.join(kind.__name__ for kind in INNER.values())}"
        )
    if exists(folder) and (is_file(folder) or listing(folder)):
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


def _write(folder: Path, retriever: Retriever, pooling: SamerPooling) -> None:
    """The folder of a pipeline: the inner model and its processor, the modules behind it, and what names them."""
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
    versions = {"sentence_transformers": sentence_transformers.__version__, "transformers": transformers.__version__}
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
