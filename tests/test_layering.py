"""The house rules that can be read from the source: which room imports which, and what no file may use."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(ROOT.glob("samer/**/*.py")) + sorted(ROOT.glob("scripts/*.py"))
SCRIPTS = sorted(path for path in ROOT.glob("scripts/*.py") if path.name != "__init__.py")

# "Imports point down": a room may import rooms below it, and those of its own rank. Every room has a rank.
RANKS = [
    {"settings"},
    {"config"},
    {"runtime", "tokens"},
    {"coords", "objects", "merging", "budgets", "kernels", "products", "codes", "scoring", "losses", "metrics"},
    {"compressors", "reducers", "data"},
    {"grounding", "retrievers"},
    {"features"},
    {"evaluation"},
    {"training", "index", "selection"},
    {"report"},
    {"compare", "search", "seps", "st", "mteb", "vectors", "export"},
    {"world"},
]
LONGEST_FILE, LONGEST_FUNCTION = 500, 80  # lines, in samer/
# What a room may import of samer, where the house says so. `merging` takes labels, so it needs the penalty.
ALLOWED = {
    "tokens": {"config"},
    "settings": set(),
    "config": {"settings"},
    "metrics": {"tokens", "config", "settings"},
    "losses": {"tokens", "config"},
    "products": {"config", "kernels"},
    "kernels": set(),
    "codes": {"products", "config"},
    "budgets": set(),
    "scoring": {"tokens", "products", "kernels", "codes", "config", "settings"},
    "coords": {"tokens", "config", "settings"},
    "objects": {"tokens", "config", "settings"},
    "merging": {"tokens", "config", "settings", "objects"},
}


def module_name(path: Path) -> str:
    """`samer/compressors/hpool.py` -> `samer.compressors.hpool`; a package's `__init__.py` -> the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def imports(tree: ast.AST, package: str, known=MODULES) -> set[str]:
    """Absolute names of the modules that a file of `package` imports, wherever in the file the import stands."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:  # `from samer import scenes` names a module, `from samer import Scene` a value
                name = f"{base}.{alias.name}"
                found.add(name if name in known else base)
    return found


def offences(tree: ast.AST) -> list[str]:
    """Uses of pickle, of code that a download brings along, and of torch.load that may unpickle."""
    found = []
    picklers = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call):
            keywords = {word.arg: word.value for word in node.keywords}
            called = ast.unparse(node.func)
            if called == "torch.load" and not _is_true(keywords.get("weights_only")):
                found.append(f"line {node.lineno}: torch.load without weights_only=True")
            if "allow_pickle" in keywords and not _is_false(keywords["allow_pickle"]):
                found.append(f"line {node.lineno}: allow_pickle")
            if called.endswith("read_pickle"):
                found.append(f"line {node.lineno}: {called}")
        if any(name.split(".")[0] in picklers or name == "torch.load" for name in names):
            found.append(f"line {node.lineno}: imports {', '.join(names)}")
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            found.append(f"line {node.value.lineno}: trust_remote_code")
        if isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            found.append(f"line {node.lineno}: trust_remote_code")
    return found


def _is_true(node) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _is_false(node) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def package_of(name: str) -> str:
    return name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]


GRAPH = {name: imports(tree_of(path), package_of(name)) for name, path in MODULES.items()}
ROOMS = sorted({name.split(".")[1] for name in MODULES if name.startswith("samer.")})


def room(name: str) -> str:
    """`samer.compressors.hpool` -> `compressors`."""
    return name.split(".")[1] if "." in name else name


def of_samer(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "samer"}


def reachable(start: str, graph) -> set[str]:
    seen, todo = set(), [start]
    while todo:
        for name in graph.get(todo.pop(), set()):
            if name not in seen:
                seen.add(name)
                todo.append(name)
    return seen


def cycle(graph) -> list[str]:
    """One import cycle, or nothing."""
    for name in graph:
        if name in reachable(name, graph):
            return sorted(other for other in reachable(name, graph) if name in reachable(other, graph))
    return []


def test_every_room_has_one_rank():
    ranked = [name for rooms in RANKS for name in rooms]
    assert sorted(ranked) == [name for name in ROOMS if name != "__init__"]


def test_the_readers_are_not_imported_for_their_types():
    """Records and pictures have rooms of their own; whoever needs a data set asks the registry for its reader."""
    for name, others in GRAPH.items():
        if name.startswith("samer.") and room(name) != "data":
            readers = {other for other in of_samer(others) if room(other) == "data"} - {
                "samer.data",
                "samer.data.records",
                "samer.data.pictures",
                "samer.data.contents",
                "samer.data.decoding",
                "samer.data.parquet",  # a kind of file, whatever lies in it
                "samer.data.chosen",
                "samer.data.dense",
                "samer.data.parts",
                "samer.data.sources",
                "samer.data.stamps",
            }
            assert not readers, f"{name} imports {sorted(readers)}"


def test_there_is_something_to_read():
    assert {"config", "coords", "losses", "merging", "metrics", "objects", "scoring", "tokens"} <= set(ROOMS)
    assert "samer.objects" in GRAPH["samer.merging"]


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_the_lowest_rooms_import_only_what_the_house_allows(name):
    others = {room(other) for other in of_samer(GRAPH[f"samer.{name}"])}
    assert others <= ALLOWED[name], f"samer/{name}.py imports {sorted(others - ALLOWED[name])} of samer"


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.startswith("samer.")))
def test_imports_point_down(name):
    rank = {each: number for number, rooms in enumerate(RANKS) for each in rooms}
    for other in of_samer(GRAPH[name]):
        assert other != "samer", f"{name} imports from the samer package itself; name the room"
        if name != "samer":
            assert rank[room(other)] <= rank[room(name)], f"{name} imports {other}, which stands above it"


def test_compressors_know_neither_the_retriever_nor_the_cache():
    for name in [name for name in MODULES if room(name) == "compressors"]:
        known = {other for other in reachable(name, GRAPH) if room(other) in ("retrievers", "index")}
        assert not known, f"{name} reaches {sorted(known)}"


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.split(".")[0] == "samer"))
def test_the_library_does_not_import_the_scripts(name):
    assert not [other for other in GRAPH[name] if other.split(".")[0] in ("scripts", "tests")]


def test_no_import_cycle():
    assert cycle({name: others & MODULES.keys() for name, others in GRAPH.items()}) == []


def private_imports(tree: ast.Module) -> list[str]:
    """Names with a leading underscore that a file takes from another."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "__future__"]
    return [alias.name for node in nodes for alias in node.names if alias.name.startswith("_")]


def too_long(tree: ast.Module) -> list[str]:
    """Functions of more lines than a reader sees at once, decorators and docstring counted."""
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    starts = [min([node.lineno, *(each.lineno for each in node.decorator_list)]) for node in functions]
    lengths = [node.end_lineno - start + 1 for node, start in zip(functions, starts)]
    return [f"{node.name}: {length}" for node, length in zip(functions, lengths) if length > LONGEST_FUNCTION]


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.split(".")[0] == "samer"))
def test_files_and_functions_are_short(name):
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{name} has {lines} lines"
    assert too_long(tree_of(MODULES[name])) == []


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.split(".")[0] == "samer"))
def test_what_another_file_takes_is_public(name):
    assert private_imports(tree_of(MODULES[name])) == []


def test_the_reader_counts_lines_and_private_names():
    body = "\n    pass" * (LONGEST_FUNCTION - 1)
    assert too_long(ast.parse(f"def f():{body}")) == []
    assert too_long(ast.parse(f"@some\ndef f():{body}")) == [f"f: {LONGEST_FUNCTION + 1}"]
    assert too_long(ast.parse(f"class A:\n  async def f():{body}\n    pass")) == [f"f: {LONGEST_FUNCTION + 1}"]
    assert private_imports(ast.parse("from a import b, _c\nfrom __future__ import annotations")) == ["_c"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles_or_runs_downloaded_code(path):
    assert offences(tree_of(path)) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_has_a_docstring_and_an_importable_main(path):
    tree = tree_of(path)
    assert ast.get_docstring(tree), f"{path.name} needs a docstring that holds its run lines"
    mains = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert len(mains) == 1, f"{path.name} needs one main(argv=None)"
    arguments = mains[0].args
    assert [argument.arg for argument in arguments.args] == ["argv"]
    assert len(arguments.defaults) == 1
    assert ast.unparse(arguments.defaults[0]) == "None"


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("import pickle", 1),
        ("from pickle import loads", 1),
        ("from torch import load", 1),
        ("import joblib.externals", 1),
        ("torch.load(path)", 1),
        ("torch.load(path, weights_only=False)", 1),
        ("torch.load(path, weights_only=flag)", 1),
        ("torch.load(path, weights_only=True)", 0),
        ("np.load(path, allow_pickle=True)", 1),
        ("np.load(path, allow_pickle=False)", 0),
        ("Model.from_pretrained(name, trust_remote_code=True)", 1),
        ("options = {'trust_remote_code': True}", 1),
        ("safetensors.torch.load_file(path)", 0),
    ],
)
def test_the_reader_finds_what_it_looks_for(line, count):
    assert len(offences(ast.parse(line))) == count


@pytest.mark.parametrize(
    ("line", "package", "expected"),
    [
        ("import samer.tokens", "samer", {"samer.tokens"}),
        ("from samer import tokens", "samer", {"samer.tokens"}),
        ("from samer import merge_tokens", "samer", {"samer"}),
        ("from samer.tokens import MergedTokens", "samer", {"samer.tokens"}),
        ("from . import tokens", "samer", {"samer.tokens"}),
        ("from .tokens import MergedTokens", "samer", {"samer.tokens"}),
        ("from ..tokens import MergedTokens", "samer.compressors", {"samer.tokens"}),
        ("def f():\n    import samer.tokens", "samer", {"samer.tokens"}),
        ("import torch", "samer", {"torch"}),
    ],
)
def test_the_reader_resolves_imports(line, package, expected):
    assert imports(ast.parse(line), package, known={"samer.tokens"}) == expected


def test_the_reader_finds_cycles():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert cycle({"a": {"a"}}) == ["a"]
