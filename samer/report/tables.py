"""A comparison's results as markdown tables; published and measured figures never share a column."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from samer.report.cells import budget_words, difference, label, markdown_table, named, number, recall
from samer.report.findings import PLAIN, against_controls, findings, lines_of, phrase_tables, size_tables
from samer.settings import Budget, vectors_of

# METHOD section 5: ColPali, K = 64 of 1,030, Flickr30K 1K; by (section, compressor) where the rows are the paper's
PUBLISHED_UNTOUCHED = {
    "none": (77.0, 92.9, 86.9),
    "hpc": (54.0, 77.8, 69.0),
    "hpool": (73.7, 91.4, 84.7),
    "sap-mean": (68.3, 88.6, 80.8),
    "samer, raster": (73.5, 91.1, 84.5),
}
PUBLISHED_ADAPTED = {"hpool": 79.2, "hpc": 67.7, "sap-mean": 80.2, "samer, raster": 82.4}
SHARES = (2, 4, 8, 16, 32)  # of N, the budgets below
PUBLISHED_BUDGETS = (83.7, 83.5, 83.1, 82.4, 81.3)  # K = 512, 256, 128, 64, 32
PUBLISHED_COMPONENTS = {  # R@1, BoxMass, CoverageIoU
    "raster: feature": (80.7, 47.6, 13.0),
    "raster: feature + spatial": (80.4, 47.8, 13.1),
    "raster: feature + spatial + object": (82.4, 54.2, 16.4),
}
PUBLISHED_GROUNDING = {  # BoxMass, RegionHit, CoverageIoU
    ("untouched", "none"): (51.8, 10.5, 2.1),
    ("untouched", "hpc"): (30.3, 2.7, 0.7),
    ("untouched", "sap-mean"): (39.9, 7.4, 1.5),
    ("untouched", "hpool"): (41.4, 62.5, 11.7),
    ("untouched", "samer, raster"): (41.3, 62.8, 11.7),
    ("adapted", "samer, raster"): (54.2, 68.3, 16.4),
}


def markdown(results: dict) -> str:
    """All tables of a comparison, each with what it shows."""
    about = results["about"]
    seeds = len(about["seeds"])
    recipe = ", ".join(f"{name} {value:g}" for name, value in about["train"].items())
    budget = about["merge"]["num_regions"]
    lines = [
        f"# Compressors compared on {about['data']}",
        "",
        f"{about['images']:,} images and {about['captions']:,} captions of `{about['split']}`, retriever "
        f"`{about['model']}`, {tokens_in_words(about)} tokens per image compressed to K = {budget_words(budget)} "
        f"(the paper: 1,030 to 64). Trained rows: mean of {seeds} seed{'s' * (seeds != 1)} "
        f"({', '.join(map(str, about['seeds']))}), projection only, through the compressor named; {recipe}. "
        "Recall is in percent, text to image unless said otherwise, with 95 % bootstrap intervals over images; "
        "± is the standard deviation over seeds. Columns marked *published* are the paper's, on Flickr30K 1K with "
        "ColPali; the others were measured here and are not comparable with them.",
        *_relevance(about),
        *lines_of(findings(results)),
    ]
    rows = {section: [row for row in results["rows"] if row["section"] == section] for section in SECTION_TITLES}
    for section, (title, words, table) in SECTION_TITLES.items():
        if rows[section]:
            beside = _controls(results) if section in ("budgets", "components", "crossed") else ""
            lines += ["", f"## {title}", "", f"{words} {beside}".strip(), "", *table(rows[section], results)]
    both = rows["untouched"] + rows["adapted"]
    if both:
        lines += lines_of([_grounding(both, results), *_by_smallest(both, results), *size_tables(results)])
        lines += lines_of(phrase_tables(results))
    lines += lines_of(_phrase_budgets(results))
    lines += lines_of(against_controls(results))
    if results["differences"]:
        words = (
            "R@1 of the first row minus that of the second, on the same captions, seeds averaged; 95 % interval over "
            "images, then seed by seed. An interval that holds 0 is no evidence for a difference."
        )
        lines += ["", "## Paired differences", "", words, "", *_difference_table(results)]
    if "cost" in results:
        lines += ["", "## Cost", "", *_cost_table(results)]
    return "\n".join(lines) + "\n"


def tokens_in_words(about: dict) -> str:
    """How many tokens an image has, or fewest to most where they differ."""
    fewest, most = about.get("tokens_range", [0, 0])
    many = str(about["tokens_per_image"])
    return many if fewest == most else f"{fewest} to {most} (mean {many})"


def _relevance(about: dict) -> list[str]:
    """What answers a caption, where it is more than its own image."""
    if "relevant" not in about:
        return []
    found = about["relevant"]
    if "grades" in found:
        return [
            "",
            f"Relevance is graded from 0 to {found['grades']}: {found['captions']:,} of {about['captions']:,} queries "
            f"are answered by more than one page, by {found['others']:,} more in all; nDCG's gain is the grade.",
        ]
    return [
        "",
        f"Relevant is every scene that satisfies a caption, by `relevant.json`: {found['captions']:,} of "
        f"{about['captions']:,} captions have others than their own, {found['others']:,} in all.",
    ]


def stored_bytes(row: dict, results: dict) -> float:
    """Bytes per image of an index: 2 per component, or what the compressor stores per vector."""
    return row["vectors"] * (row["stored_bytes_per_vector"] or 2 * results["about"]["embedding_dim"])


def _recall_cells(row: dict, results: dict) -> list[str]:
    rest = [number(row[name]) for name in ("r@5", "ndcg@10", "back:r@1")]
    return [recall(row), *rest, number(row["vectors"]), f"{stored_bytes(row, results):,.0f}"]


NO_BOX = "No caption names an object with a box, so nothing is said of grounding, of sizes and of short phrases."
GROUNDING = {"box_mass": "BoxMass", "region_hit": "RegionHit", "iou": "CovIoU", "osr": "OSR", "mixed_clusters": "mixed"}
MEASURED = ("R@1", "R@5", "nDCG@10", "R@1 image to text", "vectors", "bytes per image")


def _untouched_table(rows: Sequence[dict], results: dict) -> list[str]:
    head = ["compressor", "R@1 / R@5 / nDCG@10, published", *MEASURED]
    published = {name: " / ".join(map(str, values)) for name, values in PUBLISHED_UNTOUCHED.items()}
    body = [[row["name"], published.get(row["name"], ""), *_recall_cells(row, results)] for row in rows]
    return markdown_table(head, body)


def _adapted_table(rows: Sequence[dict], results: dict) -> list[str]:
    head = ["compressor", "R@1, published", *MEASURED]
    published = [number(PUBLISHED_ADAPTED.get(row["name"])) for row in rows]
    body = [[row["name"], cell, *_recall_cells(row, results)] for row, cell in zip(rows, published)]
    return markdown_table(head, body)


def _budget_cells(results: dict, queries: str = "") -> tuple[list[Budget], list[list[str]]]:
    """Budgets, largest first, and a row per line of the plot: its name, and recall at each of them.

    `queries`: empty for captions, or "phrases".
    """
    lines = budget_lines(results)
    budgets = budgets_of(results)[::-1]
    body = []
    for name, rows in lines.items():
        at = {row["merge"]["num_regions"]: row for row in rows}
        body.append([name, *(recall(at[k][queries] if queries else at[k]) if k in at else "" for k in budgets)])
    return budgets, body


def _budget_table(rows: Sequence[dict], results: dict) -> list[str]:
    budgets, own = _budget_cells(results)
    count = results["about"]["tokens_per_image"]
    same = budgets in ([count // share for share in SHARES], [f"1/{share}" for share in SHARES])
    published = dict(zip(budgets, PUBLISHED_BUDGETS)) if same else {}
    head = ["", *(f"K = {budget_words(k)}" for k in budgets)]
    lines = [["*SaMer, published, at the same shares N/2 to N/32*", *(number(published.get(k)) for k in budgets)]]
    return [*(markdown_table(head, lines) if published else []), "", *markdown_table(head, own)]


def _phrase_budgets(results: dict) -> list[tuple[str, str, list[str], list[list[str]]]]:
    """Budgets, asked phrases, where they were."""
    if not any("phrases" in row for rows in budget_lines(results).values() for row in rows):
        return []
    budgets, body = _budget_cells(results, "phrases")
    note = f"R@1 of phrases by K. {_controls(results, 'phrases')}"
    return [("Short phrases by budget", note, ["", *(f"K = {budget_words(k)}" for k in budgets)], body)]


def _controls(results: dict, queries: str = "") -> str:
    """All tokens, untouched and after the same training, as a sentence beside what is held against them."""
    rows = [row for row in results["rows"] if row["name"] == "none" and row["section"] in ("untouched", "adapted")]
    how = {"untouched": "untouched", "adapted": "after the same training"}
    said = [f"{how[row['section']]} {recall(row[queries] if queries else row)}" for row in rows]
    return f"All tokens: {', '.join(said)}." if said else ""


def _component_table(rows: Sequence[dict], results: dict) -> list[str]:
    head = ["components", "R@1 / BoxMass / CovIoU, published", "R@1", "BoxMass", "CovIoU", "mixed clusters"]
    body = []
    for row in rows:
        published = " / ".join(map(str, PUBLISHED_COMPONENTS.get(row["name"], ())))
        cells = [number(row[name]) for name in ("box_mass", "iou", "mixed_clusters")]
        body.append([row["name"], published, recall(row), *cells])
    return markdown_table(head, body)


def _crossed_table(rows: Sequence[dict], results: dict) -> list[str]:
    return markdown_table(
        ["projector, and compression", *MEASURED], [[r["name"], *_recall_cells(r, results)] for r in rows]
    )


def _bank_table(rows: Sequence[dict], results: dict) -> list[str]:
    told = [f"`{name}`: {what}." for name, what in results["about"].get("banks", {}).items()]
    return [" ".join(told), "", *_crossed_table(rows, results)]


def plain_tables(results: dict) -> list[tuple[str, str, list[str], list[list[str]]]]:
    """What the report shows of a comparison: (title, note, head, rows) of all but recall, where measured."""
    found = [*findings(results), *phrase_tables(results)]
    both = [row for row in results["rows"] if row["section"] in ("untouched", "adapted")]
    if both:
        note = (
            "In percent. The winning vector of each word of a phrase: share of its evidence inside the phrase's boxes "
            "(BoxMass), phrases whose regions reach IoU 0.1 with the boxes (RegionHit), that IoU (CovIoU); OSR: best "
            "similarities after compression over before; mixed: clusters with two or more annotated objects."
        )
        body = [[label(row), *(number(row[name]) for name in GROUNDING)] for row in both]
        boxless = _grounding(both, results)
        found.append(("Grounding", note, ["", *GROUNDING.values()], body) if results["sizes"] else boxless)
    budgets, body = _budget_cells(results)
    if body:
        note = "R@1, text to image, K vectors per image at most, from float32 vectors."
        found.append(("Budgets", note, ["", *(f"K = {budget_words(k)}" for k in budgets)], body))
    return found


def recall_table(results: dict) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of a comparison's untouched and trained compressors."""
    both = [row for row in results["rows"] if row["section"] in ("untouched", "adapted")]
    return ["", *MEASURED], [[label(row), *_recall_cells(row, results)] for row in both]


def _grounding(rows: Sequence[dict], results: dict) -> PLAIN:
    """What winning vectors stand on; of data without boxed phrases what needs none."""
    rest = (
        "OSR: the query tokens' best similarities after compression over before (never rank merging against pruning by "
        "it). Mixed: share of clusters that hold two or more annotated objects."
    )
    if not results["sizes"]:
        head = ["", GROUNDING["osr"], GROUNDING["mixed_clusters"]]
        body = [[label(row), number(row["osr"]), number(row["mixed_clusters"])] for row in rows]
        return "What is kept", f"{NO_BOX} {rest}", head, body
    words = (
        "The winning vector of each token of a phrase, and what it stands on: share of its evidence inside the "
        "phrase's boxes (BoxMass), phrases whose regions reach IoU 0.1 with the boxes (RegionHit), that IoU (CovIoU)."
    )
    head = ["", "BoxMass / RegionHit / CovIoU, published", *GROUNDING.values()]
    body = []
    for row in rows:
        published = " / ".join(map(str, PUBLISHED_GROUNDING.get((row["section"], row["name"]), ())))
        body.append([label(row), published, *(number(row[name]) for name in GROUNDING)])
    return "Grounding", f"{words} {rest}", head, body


def _by_smallest(rows: Sequence[dict], results: dict) -> list[PLAIN]:
    """R@1 by the smallest object that a caption names, where captions name some."""
    if not results["sizes"]:
        return []
    low, high = (f"{100 * edge:.2f} %" for edge in results["sizes"]["edges"])
    counts = ", ".join(f"{count:,}" for count in results["sizes"]["captions"])
    words = (
        f"R@1 of captions whose smallest named object covers at most {low} of the image, up to {high}, and more "
        f"({counts} captions): the object-evidence question, asked directly."
    )
    body = [[label(row), *map(number, row["r@1_by_size"])] for row in rows]
    return [("By the smallest object named", words, ["", "small", "middle", "large"], body)]


def _difference_table(results: dict) -> list[str]:
    def cell(value: dict | None) -> str:
        if value is None:
            return ""
        return difference(value["r@1"], value["interval"])

    head = ["of", "minus", "all captions", "by seed"]
    head += ["small", "middle", "large", "1 object", "2 objects", "3 or more"] if results["sizes"] else []
    body = []
    for entry in results["differences"]:
        seeds = ", ".join(f"{value:+.1f}" for value in entry["seeds"]) if len(entry["seeds"]) > 1 else ""
        by = [*entry["by_size"], *entry["by_objects"].values()]
        names = named(entry["of"]), named(entry["minus"])
        whole = difference(entry["r@1"], entry["interval"], entry.get("p"))
        body.append([*names, whole, seeds, *map(cell, by if results["sizes"] else [])])
    return markdown_table(head, body)


def _cost_table(results: dict) -> list[str]:
    cost = results["cost"]
    words = (
        f"Storage at 2 bytes per component; MaxSim operations 2 D sum(M) sum(vectors) of {cost['queries']:,} queries "
        f"against {cost['images']:,} images; queries per second measured in float32 against the same images. "
        "Published: 263.7 and 16.4 GB, 36.87e12 and 2.29e12 operations, 625.5 and 2,716.3 queries per second for "
        "1,030 and 64 vectors."
    )
    head = ["vectors per image", "GB per million images", "operations", "queries per second", "speed-up"]
    means = ["mean vectors", "mean bytes", "bytes in all", "mean operations"]
    first = cost["rows"][0]["queries_per_second"]
    body = [
        [
            budget_words(row["budget"]),
            f"{row['gb_per_million_images']:.2f}",
            f"{row['operations']:.2e}",
            f"{row['queries_per_second']:,.0f}",
            f"{row['queries_per_second'] / first:.1f}",
        ]
        for row in cost["rows"]
    ]
    if "vectors" not in cost["rows"][0]:  # earlier results
        return [words, "", *markdown_table(head, body)]
    for cells, row in zip(body, cost["rows"]):
        mean = row["operations"] / (cost["queries"] * cost["images"])
        size = row["bytes"] / cost["images"]
        cells += [f"{row['vectors'] / cost['images']:,.1f}", f"{size:,.0f}", f"{row['bytes']:,}", f"{mean:,.0f}"]
    words += " Means are per image, of operations per query and image; in all: of these images, and with these queries."
    return [words, "", *markdown_table([*head, *means], body)]


SECTION_TITLES: dict[str, tuple[str, str, Callable[[Sequence[dict], dict], list[str]]]] = {
    "untouched": ("Untouched projection", "The retriever as it is; only the compressor differs.", _untouched_table),
    "adapted": (
        "The same projection-only training",
        "Each compressor with a projector trained through it. `none` is the control: all tokens, the same training.",
        _adapted_table,
    ),
    "budgets": ("Budgets", "R@1 of captions by K, vectors per image at most.", _budget_table),
    "components": (
        "Components of SaMer",
        "Trained and merged by feature distance alone; with the spatial term; with the object prior while training.",
        _component_table,
    ),
    "crossed": (
        "Taking the gain apart",
        "Projectors trained one way, images compressed another: what is the merge's part, what the training's; and "
        "hard instead of soft assignment when the index is made.",
        _crossed_table,
    ),
    "banks": (
        "Banks of other texts",
        "The projection untouched; `querybank` by captions of the training split, and by banks that were given.",
        _bank_table,
    ),
}


def budgets_of(results: dict) -> list[Budget]:
    """K of the section budgets, smallest first; a share by what it is of the mean number of tokens."""
    found = {row["merge"]["num_regions"] for rows in budget_lines(results).values() for row in rows}
    return sorted(found, key=lambda regions: vectors_of(regions, results["about"]["tokens_per_image"]))


def budget_lines(results: dict) -> dict[str, list[dict]]:
    lines: dict[str, list[dict]] = {}
    for row in results["rows"]:
        if row["section"] == "budgets":
            lines.setdefault(row["name"].rpartition(" @ ")[0], []).append(row)
    return lines
