"""The table of faults: what is joined, and what the last row sums up."""

import json

import table


def test_groups_are_joined_by_what_is_read_and_summed_up(tmp_path, capsys):
    lines = [
        {"group": "index int8: bytes", "cases": 10, "errors": 6, "correct": 3, "known": 1, "seconds": 1.0},
        {"group": "index float16: manifest", "cases": 5, "errors": 5, "correct": 0, "known": 0, "seconds": 1.0},
        {"group": "pictures", "cases": 1000, "errors": 1000, "correct": 0, "known": 0, "seconds": 1.0},
        {"group": "SIGKILL, train", "cases": 4, "survived": 3, "bytes_lost": 7, "recovery": 1.25, "seconds": 9.0},
        {"group": "SIGTERM, train", "cases": 4, "survived": 4, "bytes_lost": 0, "recovery": 2.5, "seconds": 9.0},
        {"group": "SIGTERM, train", "cases": 1, "survived": 1, "bytes_lost": 0, "recovery": 0.5, "seconds": 9.0},
        {"group": "code in data", "cases": 2, "survived": 2, "bytes_lost": 0, "seconds": 1.0},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table.main(tmp_path / "log.jsonl")
    assert capsys.readouterr().out.splitlines() == [
        "| fault | tried | survived | bytes lost | longest recovery |",
        "|---|---|---|---|---|",
        "| SIGKILL, train | 4 | 3 | 7 | 1.2 s |",
        "| SIGTERM, train | 5 | 5 | 0 | 2.5 s |",
        "| bad bytes: index | 15 | 14 | 0 |  |",
        "| bad bytes: pictures | 1,000 | 1,000 | 0 |  |",
        "| code in data | 2 | 2 | 0 |  |",
        "| **all** | 1,026 | 1,024 | 7 | 2.5 s |",
    ]
