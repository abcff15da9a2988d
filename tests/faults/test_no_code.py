"""No file that the tool reads runs code: nothing is unpickled, imported, downloaded or handed to another program.

Every attack here leaves a canary file when it works; that it does work on who trusts it is part of each test where it
can be shown. An audit hook listens for unpickling and for other programs being started.
"""

import ast
import contextlib
import json
import os
import pickle
import pickletools
import shutil
import struct
import sys
import warnings
from pathlib import Path

import pytest
import torch
from harness import Spoiled
from stores import MERGE, Drawn, make_cache, make_projectors, questions, small_data
from transformers.utils import logging as transformers_logging

from samer.config import InputError, load_config
from samer.data.flickr import load_split
from samer.data.pictures import load_image
from samer.features.read import FeatureStore
from samer.index.read import Index
from samer.index.settings import adapter_config
from samer.retrievers.hf import Retriever
from samer.retrievers.projectors import load_projector, save_projector

ROOT = Path(__file__).resolve().parents[2]
HEARD: list[tuple] = []
LISTENING = [False]
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pickle.find_class")


def _hook(event, arguments):
    if LISTENING[0] and event in PROGRAMS:
        HEARD.append((event, *map(str, arguments[:2])))


sys.addaudithook(_hook)  # it can't be taken off again, so it listens only when it is told to


@contextlib.contextmanager
def listening():
    """What is unpickled or started within the block."""
    HEARD.clear()
    LISTENING[0] = True
    try:
        yield HEARD
    finally:
        LISTENING[0] = False


class Call:
    """Unpickled, it calls a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def attacks(canary):
    """Objects that touch the canary when they are unpickled, by name."""
    text = f"open({str(canary)!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch {canary}"),
        "exec": Call(exec, text),
        "eval": Call(eval, text),
        "open": Call(open, str(canary), "w"),
        "Path.touch": Call(Path.touch, Path(canary)),
        "os.mkdir": Call(os.mkdir, str(canary)),
        "nested": {"projector_state_dict": {"weight": Call(os.system, f"touch {canary}")}},
    }


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def bites(payload, canary):
    """Shows that a pickle does what it should, to who trusts it."""
    with contextlib.suppress(Exception):
        pickle.loads(payload)
    assert canary.exists()
    canary.rmdir() if canary.is_dir() else canary.unlink()


# --- pickles --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", sorted(attacks("x")))
@pytest.mark.parametrize("how", ["zip", "old format", *(f"pickle {k}" for k in range(6))])
def test_a_projector_file_runs_nothing(tmp_path, canary, how, name):
    file, attack = tmp_path / "projector.pt", attacks(canary)[name]
    state = {"weight": torch.zeros(16, 16), "bias": torch.zeros(16)}
    content = {"format": "samer_projector_v1", "projector_state_dict": state, "more": attack}
    if how.startswith("pickle"):
        file.write_bytes(pickle.dumps({**content, "projector_state_dict": {}}, protocol=int(how[-1])))
        bites(file.read_bytes(), canary)
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how == "zip")
        if name != "nested":
            with contextlib.suppress(Exception):
                torch.load(file, weights_only=False)
            assert canary.exists()
            canary.rmdir() if canary.is_dir() else canary.unlink()
    for path in (tmp_path, file):
        with listening() as heard, pytest.raises(InputError, match=r"projector\.pt"):
            load_projector(path, Drawn())
        assert heard == []


def test_a_torchscript_file_is_not_run(tmp_path, canary):
    class Module(torch.nn.Module):
        def forward(self, x):
            return x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Module()).save(str(tmp_path / "projector.pt"))
        with pytest.raises(InputError, match=r"projector\.pt"):
            load_projector(tmp_path, Drawn())


@pytest.mark.parametrize("beside", [False, True])
def test_an_adapters_pickle_is_not_opened(tmp_path, canary, beside):
    make_projectors(tmp_path / "p")
    folder = tmp_path / "p" / "lora"
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(attacks(canary)["os.system"]))
    (folder / "projector.pt").write_bytes(pickle.dumps(attacks(canary)["os.system"]))
    bites((folder / "adapter_model.bin").read_bytes(), canary)
    if beside:
        assert load_projector(folder, Drawn()).weight.shape == (16, 16)
    else:
        (folder / "adapter_model.safetensors").unlink()
        with pytest.raises(InputError, match=r"adapter_model\.safetensors"):
            load_projector(folder, Drawn())


@pytest.fixture(scope="module")
def places(world, tmp_path_factory):
    """A small data set, an index of it and projectors, to be spoiled."""
    place = tmp_path_factory.mktemp("code")
    data = small_data(world, place / "data")
    make_cache(place / "cache", data, "binary")
    make_projectors(place / "projectors")
    return {name: Spoiled(place / name, place / f"{name}-work") for name in ("data", "cache", "projectors")}


@pytest.mark.filterwarnings("ignore")
def test_a_pickle_in_the_place_of_any_file_runs_nothing(places, canary, tmp_path):
    """Bytes that run code when unpickled, under every name that is read; beside each, as .pkl, too."""
    payload = pickle.dumps(attacks(canary)["os.system"], protocol=2)
    assert any(op.name == "REDUCE" for op, *_ in pickletools.genops(payload))
    bites(payload, canary)

    def read(folder, name):
        if name == "data":
            records = load_split(folder, "test", boxes=True)
            return [load_image(record.image_path) for record in records]
        if name == "projectors":
            return [load_projector(path, Drawn()) for path in sorted(folder.iterdir())]
        cache = Index(folder)
        cache.projector()
        list(cache.queries("test"))
        cache.scores("test")
        return cache.search(questions(), "test", 2)

    refused = 0
    for name, work in places.items():
        for file in work.names:
            work.write(file, payload)
            work.write(file + ".pkl", payload)
            with listening() as heard:
                try:
                    read(work.folder, name)
                except InputError:
                    refused += 1
            assert heard == [], file
            assert not canary.exists(), file
            work.restore()
    assert refused >= 20


# --- YAML and JSON --------------------------------------------------------------------------------------------------

TAGS = [
    "!!python/object/apply:builtins.exec [\"open('{canary}', 'w')\"]",
    "!!python/object/apply:builtins.eval [\"open('{canary}', 'w')\"]",
    "!!python/object/new:builtins.open ['{canary}', 'w']",
    "!!python/object/apply:subprocess.Popen [[touch, '{canary}']]",
    "!!python/module:canary_module",
    "!!python/name:canary_module.value",
    "!!python/object:canary_module.Value {{}}",
    "!!python/tuple [1]",
    "!canary 1",
    "!!map/python 1",
]


@pytest.fixture
def canary_module(tmp_path, monkeypatch):
    """A module that leaves a canary when it is imported, where Python looks first."""
    path = tmp_path / "canary_of_import"
    source = f"open({str(path)!r}, 'w').close()\nvalue = 1\nclass Value: ...\n"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "canary_module.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    yield "canary_module"
    imported = [name for name in ("canary_module", "megatron") if sys.modules.pop(name, None)]
    assert not path.exists()
    assert imported == []


@pytest.mark.parametrize("tag", TAGS)
def test_yaml_tags_run_nothing_by_any_way_in(tmp_path, canary, canary_module, tag, script):
    text = tag.format(canary=canary)
    path = tmp_path / "a.yaml"
    for content in (f"train:\n  seed: {text}\n", f"? {text}\n: 1\n", f"a: &x {text}\nb: *x\n", f"--- {text}\n--- 1\n"):
        path.write_text(content)
        with listening() as heard, pytest.raises(InputError, match=r"a\.yaml"):
            load_config(path)
        assert heard == []
    with listening() as heard:
        with pytest.raises(InputError, match="not valid YAML"):
            script("train").main(["--config", str(ROOT / "configs/demo.yaml"), f"merge.num_regions={text}"])
        # a projector's settings become overrides, which are read as YAML
        save_projector(tmp_path / "p", Drawn().base_projector, Drawn(), MERGE)
        config = json.loads((tmp_path / "p" / "config.json").read_text())
        for merge in ({"num_regions": text}, {f"num_regions={text} ": 1}, {"num_regions": {"a": text}}):
            (tmp_path / "p" / "config.json").write_text(json.dumps({**config, "merge": merge}))
            with pytest.raises(InputError):
                adapter_config(str(tmp_path / "p"), None, [])
    assert heard == []


def test_an_adapters_settings_import_no_megatron(tmp_path, monkeypatch):
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "__init__.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    make_projectors(tmp_path / "p")
    path = tmp_path / "p" / "lora" / "adapter_config.json"
    change = {"megatron_config": {"a": 1}, "megatron_core": "megatron.core"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    try:
        with contextlib.suppress(InputError):
            load_projector(path.parent, Drawn())
    finally:
        sys.modules.pop("megatron", None)
    assert not (tmp_path / "canary").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "canary_module"},
        {"auto_mapping": {"base_model_class": "Value", "parent_library": "canary_module"}},
        {"auto_mapping": {"base_model_class": "Value", "parent_library": "canary_module"}, "task_type": "CAUSAL_LM"},
        {"peft_type": "canary_module.Value"},
        {"target_modules": "canary_module"},
        {"_custom_modules": {"canary_module.Value": "canary_module.Value"}},
        {"base_model_name_or_path": "canary_module", "revision": "canary_module"},
        {"init_lora_weights": "canary_module"},
    ],
    ids=lambda change: ",".join(change),
)
def test_an_adapters_settings_import_nothing(tmp_path, canary_module, change):
    make_projectors(tmp_path / "p")
    path = tmp_path / "p" / "lora" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with listening() as heard, contextlib.suppress(InputError):
        load_projector(path.parent, Drawn())
    assert heard == []


# --- the model's folder ---------------------------------------------------------------------------------------------

CLASSES = {
    "config.json": ["AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor", "AutoTokenizer"],
    "processor_config.json": ["AutoProcessor", "AutoImageProcessor", "AutoTokenizer"],
    "tokenizer_config.json": ["AutoTokenizer", "AutoProcessor"],
    "preprocessor_config.json": ["AutoImageProcessor", "AutoProcessor"],
}


@pytest.fixture
def model(base, tmp_path):
    transformers_logging.set_verbosity_error()
    return Path(shutil.copytree(base, tmp_path / "model"))


def loads(folder):
    """Loads a model's folder, quietly; whether it loaded. Nothing but a refusal may come of it."""
    with listening() as heard, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused = None
        try:
            Retriever.load(str(folder), local_files_only=True).query_inputs(["a dog"])
        except InputError as error:
            refused = str(error)
    assert heard == []
    assert refused is None or str(folder) in refused
    return refused is None


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("where", ["evil.{kind}", "{folder}--evil.{kind}", "nobody/evil--evil.{kind}"])
def test_code_beside_a_model_is_not_imported(model, canary, name, where):
    source = f"open({str(canary)!r}, 'w').close()\n" + "".join(
        f"class {kind}: ...\n" for kind in CLASSES["config.json"]
    )
    for file in ("evil.py", "modeling_evil.py", "conftest.py", "__init__.py", "tokenization_evil.py"):
        (model / file).write_text(source)
    path = model / name
    content = json.loads(path.read_text()) if path.is_file() else {}
    content["auto_map"] = {kind: where.format(kind=kind, folder=model) for kind in CLASSES[name]}
    content["custom_pipelines"] = {"x": {"impl": "evil.AutoModel", "pt": ["AutoModel"]}}
    path.write_text(json.dumps(content))
    loads(model)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "EvilTokenizer"}),
        ("tokenizer_config.json", {"tokenizer_class": "../evil"}),
        ("tokenizer_config.json", {"chat_template": "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}"}),
        ("tokenizer_config.json", {"tokenizer_file": "CANARY", "vocab_file": "/etc/passwd"}),
        ("processor_config.json", {"processor_class": "EvilProcessor"}),
        ("processor_config.json", {"image_processor_type": "EvilProcessor"}),
        ("config.json", {"architectures": ["EvilModel"]}),
        ("config.json", {"model_type": "evil"}),
        ("config.json", {"quantization_config": {"quant_method": "evil"}}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_other_settings_of_a_model_run_nothing(model, canary, name, change):
    source = f"open({str(canary)!r}, 'w').close()\n"
    for file in ("evil.py", "EvilTokenizer.py", "tokenization_evil.py"):
        (model / file).write_text(source)
    path = model / name
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **json.loads(json.dumps(change).replace("CANARY", str(canary)))}))
    loads(model)


@pytest.mark.parametrize(
    "part",
    [
        "",
        "vlm_config",
        "text_config",
    ],
)
@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_a_models_attention_is_never_fetched(model, monkeypatch, key, part):
    import transformers.modeling_utils

    asked = []
    for place in (transformers.modeling_utils, sys.modules["transformers.integrations.hub_kernels"]):
        for name in ("load_and_register_attn_kernel", "lazy_import_paged_flash_attention", "get_kernel"):
            if hasattr(place, name):
                monkeypatch.setattr(place, name, lambda *words, **rest: asked.append(words))
    content = json.loads((model / "config.json").read_text())
    inner = content if not part else content["vlm_config"] if part == "vlm_config" else content["vlm_config"][part]
    inner[key] = "nobody/evil-kernel:touch"
    (model / "config.json").write_text(json.dumps(content))
    with warnings.catch_warnings(), contextlib.suppress(InputError):
        warnings.simplefilter("ignore")
        Retriever.load(str(model), local_files_only=True)
    assert asked == []


@pytest.mark.parametrize("how", ["bin", "bin and index", "weights renamed", "training_args.bin", "tokenizer pickles"])
def test_a_models_pickles_run_nothing(model, canary, how):
    payload = pickle.dumps(attacks(canary)["os.system"], protocol=2)
    bites(payload, canary)
    if how == "tokenizer pickles":
        for name in ("tokenizer.model", "vocab.pkl", "special_tokens_map.json", "added_tokens.json", "spiece.model"):
            (model / name).write_bytes(payload)
    elif how == "training_args.bin":
        (model / "training_args.bin").write_bytes(payload)
        assert loads(model)
        return
    elif how == "weights renamed":
        (model / "model.safetensors").write_bytes(payload)
    else:
        (model / "model.safetensors").unlink()
        torch.save({"vlm.x": attacks(canary)["os.system"]}, model / "pytorch_model.bin")
        if how == "bin and index":
            index = {"metadata": {}, "weight_map": {"vlm.x": "pytorch_model.bin"}}
            (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    if how.startswith("bin"):
        # known defect: torch's refusal is no InputError (test_a_models_pickles_are_refused_by_name); it runs nothing
        with listening() as heard, contextlib.suppress(pickle.UnpicklingError, InputError):
            assert Retriever.load(str(model), local_files_only=True) is None
        assert heard == []
        return
    assert not loads(model) or how == "tokenizer pickles"


def test_a_models_pickles_are_refused_by_name(model, canary):
    (model / "model.safetensors").unlink()
    torch.save({"vlm.x": attacks(canary)["os.system"]}, model / "pytorch_model.bin")
    assert not loads(model)


def test_a_feature_store_reads_no_pickle(model, canary, tmp_path):
    """An index of weights may name any file of the model's folder: it is hashed, never opened as more."""
    payload = pickle.dumps(attacks(canary)["os.system"])
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "evil.bin"}}))
    (model / "evil.bin").write_bytes(payload)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_bytes(payload)
    with listening() as heard, pytest.raises(InputError, match=r"manifest\.json"):
        FeatureStore(tmp_path / "store", str(model))
    assert heard == []


# --- pictures -------------------------------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\n(x) run showpage\n%%EOF\n"
DOS_EPS = struct.pack("<IIIIIIIH", 0xC6D3D0C5, 32, len(EPS), 0, 0, 0, 0, 0) + b"\0\0" + EPS


def defect_eps(path, tmp_path, monkeypatch, content):
    """PostScript under a picture's name: Pillow would hand it to Ghostscript."""
    canary = tmp_path / "canary"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {canary}\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # what it found before is forgotten
    path.write_bytes(content)
    with listening() as heard, pytest.raises(InputError, match=path.name):
        load_image(path)
    assert heard == []
    assert not canary.exists()


@pytest.mark.parametrize("content", [EPS, DOS_EPS], ids=["eps", "dos eps"])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.eps"])
def test_a_picture_starts_no_program(tmp_path, monkeypatch, name, content):
    defect_eps(tmp_path / name, tmp_path, monkeypatch, content)


# --- the sources ----------------------------------------------------------------------------------------------------

SOURCES = sorted(path for folder in ("samer", "scripts") for path in (ROOT / folder).rglob("*.py"))
FORBIDDEN = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pty.spawn", "runpy.run_path"}
FORBIDDEN |= {"yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "torch.hub.load", "torch.jit.load", "np.load"}
FORBIDDEN |= {"torch.serialization.add_safe_globals", "importlib.import_module", "code.interact", "numpy.load"}


def _own_module(called, node):
    """Whether a call imports a module of samer, whatever it is given."""
    name = (
        node.args[0].values[0] if called == "importlib.import_module" and isinstance(node.args[0], ast.JoinedStr) else 0
    )
    return isinstance(name, ast.Constant) and name.value.startswith("samer.")


def doings(source):
    """Calls that run what they are given, in a piece of source."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in FORBIDDEN and not _own_module(called, node):
                found.append(called)
            if called in ("yaml.load", "yaml.load_all"):
                loader = next((ast.unparse(word.value) for word in node.keywords if word.arg == "Loader"), "none")
                if loader not in ("_OnceLoader", "yaml.SafeLoader"):
                    found.append(f"{called} with {loader}")
            if any(word.arg == "shell" for word in node.keywords):
                found.append(f"{called} with a shell")
            if called.endswith("from_pretrained") and any(word.arg == "code_revision" for word in node.keywords):
                found.append(f"{called} with code_revision")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(path):
    assert doings(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("eval(text)", 1),
        ("model.eval()", 0),
        ("re.compile(text)", 0),
        ("yaml.load(text)", 1),
        ("yaml.load(text, Loader=yaml.Loader)", 1),
        ("yaml.load(text, Loader=_OnceLoader)", 0),
        ("subprocess.run(text, shell=True)", 1),
        ("importlib.import_module(name)", 1),
        ('importlib.import_module(f"{name}.x")', 1),
        ('importlib.import_module(f"samer.{name}")', 0),
    ],
)
def test_the_reader_of_sources_sees(line, count):
    assert len(doings(line)) == count


def test_no_remote_code_is_trusted_anywhere():
    """Not in sources, launchers, settings or what the project brings along."""
    words, looked = ("trust_remote_code", "auto_map", "weights_only=False", "allow_pickle=True"), 0
    for folder in ("samer", "scripts", "bash", "configs", "assets"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".sh", ".yaml", ".json", ".html", ".js", ".txt", ".md", ".jinja"):
                looked += 1
                text = path.read_text(encoding="utf-8")
                assert not [word for word in words if word in text], path
    assert looked > 60


def test_what_the_project_brings_along_holds_no_pickle():
    for path in sorted((ROOT / "assets").rglob("*")):
        assert path.suffix not in (".pt", ".bin", ".pkl", ".ckpt", ".npy", ".npz", ".joblib"), path


def test_the_canary_is_heard():
    """The hook hears what it should, so that silence means something."""
    with listening() as heard:
        pickle.loads(pickle.dumps(Call(len, "abc")))
        os.system("true")
    assert {event for event, *_ in heard} == {"pickle.find_class", "os.system"}
