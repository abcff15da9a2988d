"""One table of all fault tests, from the lines that they wrote to SAMER_FAULT_LOG.

python tests/faults/table.py outputs/faults.jsonl        (bash/faults.sh does it)
"""

import json
import sys
from pathlib import Path

FORMS = {"float32", "float16", "int8", "binary", "ours", "lora", "whole", "legacy"}  # of one kind of file


def merged(lines):
    """Rows by kind of fault: groups of bad bytes are joined by what is read, the others stand for themselves."""
    rows = {}
    for line in lines:
        name = line["group"]
        if "errors" in line:  # a survey of spoiled files
            words = [word for word in name.split(":")[0].split() if word not in FORMS]
            name = "numbers" if words == ["numerics"] else f"bad bytes: {' '.join(words)}"
        row = rows.setdefault(name, {"cases": 0, "survived": 0, "bytes_lost": 0, "recovery": None, "seconds": 0.0})
        row["cases"] += line["cases"]
        row["survived"] += line.get("survived", line.get("errors", 0) + line.get("correct", 0))
        row["bytes_lost"] += line.get("bytes_lost", 0)
        row["seconds"] += line["seconds"]
        if "recovery" in line:
            row["recovery"] = max(row["recovery"] or 0, line["recovery"])
    return rows


def table(rows):
    """The rows and their sum in Markdown."""
    seconds = lambda value: "" if value is None else f"{value:.1f} s"
    whole = {key: sum(row[key] for row in rows.values()) for key in ("cases", "survived", "bytes_lost")}
    recovery = max((row["recovery"] for row in rows.values() if row["recovery"] is not None), default=None)
    yield "| fault | tried | survived | bytes lost | longest recovery |"
    yield "|---|---|---|---|---|"
    for name, row in [*sorted(rows.items()), ("**all**", {**whole, "recovery": recovery})]:
        cells = (name, f"{row['cases']:,}", f"{row['survived']:,}", f"{row['bytes_lost']:,}", seconds(row["recovery"]))
        yield f"| {' | '.join(cells)} |"


def main(path):
    lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    print("\n".join(table(merged(line for line in lines if line["group"] != "soak"))))
    for line in lines:
        if line["group"] == "soak":
            print(
                f"\nSoak, {line['seconds'] / 60:.0f} minutes on one index: {line['rounds']:,} rounds, "
                f"{line['added']:,} pictures added, {line['deleted']:,} deleted, {line['compactions']:,} compactions, "
                f"{line['searches']:,} searches, {line['wrong']} of which found other pictures than the index holds; "
                f"{line['compared']:,} whole rankings compared with an index built anew, {line['different']} differ. "
                f"Second and last quarter: {line['resident_mb'][0]:.0f} and {line['resident_mb'][1]:.0f} MB resident, "
                f"{line['own_mb'][0]:.0f} and {line['own_mb'][1]:.0f} MB of it not mapped files, "
                f"{line['files'][0]:.0f} and {line['files'][1]:.0f} open files."
            )


if __name__ == "__main__":
    main(sys.argv[1])
