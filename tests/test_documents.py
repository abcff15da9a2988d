"""Metadata of images: kept beside an index, filtered by, and pages joined to documents."""

import json

import pytest
import torch
from test_index import NAMES, Drawn, add, paint

from samer.config import InputError, MergeConfig
from samer.index.columns import FILE, columns_in_file, give_columns, read_columns, write_columns
from samer.index.filters import parse_condition, rows_that_meet
from samer.index.pictures import delete_images
from samer.index.read import Index
from samer.index.verify import verify
from samer.search.documents import best_documents, find_documents

COLUMNS = {
    name: {"report": f"r{k % 5}", "page": k, "lang": "de" if k % 2 else "en"} for k, name in enumerate(NAMES[:-1])
}


def refusal(call, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return paint(tmp_path_factory.mktemp("pictures"), NAMES)


@pytest.fixture(params=["float32", "int8", "binary"])
def index(request, pictures, tmp_path):
    add(tmp_path / "index", pictures, dtype=request.param)
    write_columns(tmp_path / "index", "images", COLUMNS)
    return Index(tmp_path / "index")


def scores_of(index, query):
    """Every image's score by the vectors that the index holds, one by one."""
    tokens = query.tokens[0][query.mask[0]]
    found = {}
    for name, number in index.numbers("images").items():
        stored = index.vectors("images", number)
        found[name] = float((tokens @ stored.tokens[stored.mask].T).max(1).values.mean())
    return found


# --- conditions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("condition", "value", "met"),
    [
        ("lang=en", "en", True),
        ("lang=en", "de", False),
        ("lang = en | de", "de", True),
        ("lang=en", None, False),
        ("lang!=en", None, True),
        ("lang!=en|fr", "fr", False),
        ("page=3", 3, True),
        ("page=3", 3.0, True),
        ("page=3", "3", True),
        ("page=3", 30, False),
        ("page>=3", 3, True),
        ("page>3", 3, False),
        ("page<3.5", 3, True),
        ("page<10", 9, True),
        ("page<10", None, False),
        ("page<ten", 9, False),
        ("day<2024-05-01", "2024-04-30", True),
        ("day<=2024-05-01", "2024-05-02", False),
        ("good=true", True, True),
        ("good=1", True, False),
        ("good=False", False, True),
        ("name=a=b", "a=b", True),
        ("page==3", 3, True),
        ("page==3|4", 5, False),
    ],
)
def test_conditions(condition, value, met):
    assert parse_condition(condition).met_by(value) is met


@pytest.mark.parametrize("text", ["", "page", "=3", ">=3"])
def test_what_is_no_condition(text):
    assert "condition" in refusal(parse_condition, text)


def test_all_conditions_must_be_met_and_an_unknown_column_is_named():
    numbers = {name: 2 * k for k, name in enumerate(NAMES)}  # rows between belong to nothing
    asked = [parse_condition("page>=3"), parse_condition("lang=de")]
    keep = rows_that_meet(asked, COLUMNS, numbers, 2 * len(NAMES))
    assert keep.nonzero()[:, 0].tolist() == [6, 10, 14, 18]
    assert "lang, page, report" in refusal(rows_that_meet, [parse_condition("size=1")], COLUMNS, numbers, 24)


def test_a_filtered_search_is_the_search_of_what_is_left(index):
    delete_images(index.folder, "images", [NAMES[3]])
    index = Index(index.folder)
    for seed in range(3):
        query = Drawn().encode_queries(Drawn().query_inputs([f"q{seed}"]))
        asked = [parse_condition("lang=de"), parse_condition("page<9")]
        rows = sum(shard.count for shard in index.manifest.splits["images"].images)
        keep = rows_that_meet(asked, COLUMNS, index.numbers("images"), rows)
        left = {NAMES[k] for k in (1, 5, 7)}
        truth = {name: score for name, score in scores_of(index, query).items() if name in left}
        found = index.search(query, "images", 10, keep=keep)[0]
        assert [name for name, _ in found] == sorted(truth, key=lambda name: (-truth[name], name))
        for name, score in found:
            assert score == pytest.approx(truth[name], abs=0.02)
    assert index.search(query, "images", 10, keep=torch.zeros(rows, dtype=torch.bool)) == [[]]


# --- documents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [1, 2, 9])
def test_a_document_is_the_mean_of_its_best_pages(index, pages):
    query = Drawn().encode_queries(Drawn().query_inputs(["two words"]))
    truth = scores_of(index, query)
    names = {name: own["report"] for name, own in COLUMNS.items()}
    members = {}
    for name, score in truth.items():
        members.setdefault(names.get(name, name), []).append((score, name))
    expected = {}
    for document, own in members.items():
        best = sorted(own, reverse=True)[:pages]
        expected[document] = sum(score for score, _ in best) / len(best)
    found = find_documents(index, "images", query, names, 4, pages=pages)
    assert [each.name for each in found] == sorted(expected, key=expected.get, reverse=True)[:4]
    assert NAMES[-1] in expected  # it has no report, so it is one by itself
    for each in found:
        assert each.score == pytest.approx(expected[each.name], abs=0.02)
        assert [name for name, _ in each.pages] == [
            name for _, name in sorted(members[each.name], reverse=True)[:pages]
        ]


def test_documents_of_what_a_filter_leaves(index):
    query = Drawn().encode_queries(Drawn().query_inputs(["x"]))
    names = {name: own["report"] for name, own in COLUMNS.items()}
    keep = torch.zeros(len(NAMES), dtype=torch.bool)
    numbers = index.numbers("images")
    keep[[numbers[NAMES[0]], numbers[NAMES[6]]]] = True
    found = find_documents(index, "images", query, names, 10, pages=3, keep=keep)
    assert {each.name: [name for name, _ in each.pages] for each in found} == {"r0": [NAMES[0]], "r1": [NAMES[6]]}
    assert find_documents(index, "images", query, names, 10, keep=~keep & keep) == []


def test_equal_documents_go_by_name():
    scores = torch.tensor([0.5, 0.7, 0.5, 0.3])
    found = best_documents(["b1", "a1", "a0", "c"], scores, {"b1": "b", "a1": "a", "a0": "a"}, 3, 2)
    assert [(each.name, each.pages) for each in found] == [
        ("a", [("a1", scores[1].item()), ("a0", 0.5)]),
        ("b", [("b1", 0.5)]),
        ("c", [("c", scores[3].item())]),
    ]
    tied = best_documents(["y", "x"], torch.tensor([0.5, 0.5]), {}, 1, 1)
    assert [each.name for each in tied] == ["x"]
    assert "at least 1" in refusal(find_documents, None, "", None, {}, 0)


# --- files ------------------------------------------------------------------------------------------------------------


def test_metadata_from_the_files_that_people_have(tmp_path):
    (tmp_path / "m.csv").write_text("id,page,lang,share\n007,3,en,0.5\n8,,de,x\n", encoding="utf-8")
    rows = {"007": {"page": 3, "lang": "en", "share": 0.5}, "8": {"page": None, "lang": "de", "share": "x"}}
    assert columns_in_file(tmp_path / "m.csv") == rows
    lines = [json.dumps({"corpus-id": name, **own}) for name, own in rows.items()]
    (tmp_path / "m.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    assert columns_in_file(tmp_path / "m.jsonl") == rows
    pa = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    import pyarrow.parquet as pq

    table = {"corpus_id": [7, 8], "doc_id": ["a", None], "image": [{"bytes": b"x"}] * 2}
    pq.write_table(pa.table(table), tmp_path / "m.parquet")
    assert columns_in_file(tmp_path / "m.parquet") == {"7": {"doc_id": "a"}, "8": {"doc_id": None}}


def test_names_that_look_like_numbers_stay_names_and_no_number_is_none(tmp_path):
    """What Python's int and float take and a spreadsheet means as a name."""
    (tmp_path / "m.csv").write_text("id,report,size\na,2020_01,1e3\nb,007,-0.5\nc,1_0.5,+2\n", encoding="utf-8")
    assert columns_in_file(tmp_path / "m.csv") == {
        "a": {"report": "2020_01", "size": 1000.0},
        "b": {"report": "007", "size": -0.5},
        "c": {"report": "1_0.5", "size": 2},
    }
    (tmp_path / "m.jsonl").write_text('{"id": "a", "size": NaN}\n', encoding="utf-8")
    assert columns_in_file(tmp_path / "m.jsonl") == {"a": {"size": None}}


def test_days_of_a_table_are_texts(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    import pyarrow.parquet as pq

    when = pa.array([1_714_521_600_000_000_007, None], pa.timestamp("ns"))
    pq.write_table(pa.table({"id": ["a", "b"], "when": when}), tmp_path / "m.parquet")
    assert columns_in_file(tmp_path / "m.parquet") == {"a": {"when": "2024-05-01T00:00:00"}, "b": {"when": None}}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m.txt", "", ".jsonl, .csv or .parquet"),
        ("m.csv", "id,page\na,1,2\n", "row 1 has more or fewer"),
        ("m.csv", "id,page\na\n", "row 1 has more or fewer"),
        ("m.csv", "name\na\n", "row 1: no id"),
        ("m.csv", "id\na\na\n", "row 2: the id 'a' came before"),
        ("m.jsonl", '{"id": "a"}\n{', "line 2 is no JSON"),
        ("m.jsonl", "[1]", "line 1: no id"),
        ("m.jsonl", '{"id": "a", "tags": [1]}', "'tags' is no text"),
        ("m.jsonl", '{"id": "a", "size": Infinity}', "'size' is no text"),
    ],
)
def test_files_that_hold_something_else(tmp_path, name, content, words):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert words in refusal(columns_in_file, tmp_path / name)


def test_metadata_goes_to_an_index_and_is_vouched_for(pictures, tmp_path, script, capsys):
    add(tmp_path / "index", pictures)
    (tmp_path / "m.csv").write_text("id,page\np1.png,3\nother.png,4\n", encoding="utf-8")
    script("index").main(["--cache-dir", str(tmp_path / "index"), "--metadata", str(tmp_path / "m.csv")])
    assert "metadata of 1 images of images; 1 rows name none" in capsys.readouterr().out
    assert read_columns(tmp_path / "index", "images") == {"p1.png": {"page": 3}}
    assert verify(tmp_path / "index").damages == []
    path = tmp_path / "index" / "images" / FILE
    path.write_bytes(path.read_bytes().replace(b"3", b"4"))
    assert any(FILE in line for line in verify(tmp_path / "index").damages)
    assert "checksum" in refusal(read_columns, tmp_path / "index", "images")
    (tmp_path / "m.csv").write_text("id,page\nother.png,4\n", encoding="utf-8")
    assert "none of its 1 ids" in refusal(give_columns, tmp_path / "index", tmp_path / "m.csv")
    write_columns(tmp_path / "index", "images", {})
    assert not path.exists()


def test_metadata_follows_a_picture_that_moves(tmp_path):
    root = paint(tmp_path / "pictures", NAMES[:3])
    add(tmp_path / "index", root, NAMES[:3])
    write_columns(tmp_path / "index", "images", {name: {"page": k} for k, name in enumerate(NAMES[:3])})
    (root / NAMES[1]).rename(root / "other.png")
    add(tmp_path / "index", root, [NAMES[0], NAMES[2], "other.png"], remove_gone=True)
    expected = {NAMES[0]: {"page": 0}, NAMES[2]: {"page": 2}, "other.png": {"page": 1}}
    assert read_columns(tmp_path / "index", "images") == expected


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_filters_and_joins(base, tmp_path, script, capsys):
    from samer.retrievers.hf import Retriever

    names = [f"p{k}.png" for k in range(6)]
    root = paint(tmp_path / "pictures", names)
    encoder = Retriever.load(str(base), dtype=torch.float32)
    add(tmp_path / "index", root, names, dtype="float32", encoder=encoder, merge=MergeConfig(num_regions=6))
    write_columns(
        tmp_path / "index", "images", {name: {"report": f"r{k % 2}", "page": k} for k, name in enumerate(names)}
    )
    words = ["--cache-dir", str(tmp_path / "index"), "--json", "a red car"]
    capsys.readouterr()
    everything = script("search").main(words)[0]["results"]
    assert everything[0]["metadata"]["page"] == names.index(everything[0]["id"])
    some = script("search").main([*words, "--filter", "page>=2", "--filter", "page!=4"])[0]["results"]
    assert [row["id"] for row in some] == [
        row["id"] for row in everything if row["id"] in ("p2.png", "p3.png", "p5.png")
    ]
    joined = script("search").main([*words, "--documents", "report", "--pages", "3"])[0]["results"]
    assert {row["document"] for row in joined} == {"r0", "r1"}
    for row in joined:
        own = [each for each in everything if each["metadata"]["report"] == row["document"]]
        assert [page["id"] for page in row["pages"]] == [each["id"] for each in own]
        assert row["score"] == pytest.approx(sum(each["score"] for each in own) / 3, abs=1e-5)
    capsys.readouterr()
    script("search").main([*words[:2], "a red car", "--documents", "report"])
    assert capsys.readouterr().out.splitlines()[1].split()[2] in ("r0:", "r1:")
    assert "no image has a column" in refusal(script("search").main, [*words, "--documents", "book"])
    assert "no image has a column" in refusal(script("search").main, [*words, "--filter", "size>1"])
