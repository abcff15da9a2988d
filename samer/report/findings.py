"""What a comparison's rows show against each other, as tables: whether the queries discriminate, claims, controls."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from samer.report.cells import budget_words, difference, label, markdown_table, named, number, recall
from samer.settings import Budget

SETS = {"captions": "captions", "phrases": "phrases", "rare_phrases": "rare phrases"}
PLAIN = tuple[str, str, list[str], list[list[str]]]  # title, note, head, rows
HOW = (
    "R@1 of the first row minus that of the second on the same queries, seeds averaged; 95 % interval and two-sided p "
    "by a paired bootstrap over images (10,000 resamples), p not corrected for the number of comparisons. An interval "
    "that holds 0 is no evidence for a difference, and none against one. It is for the trainings that were run: "
    "a verdict on trained rows asks that all seeds agree, and none is given for one seed."
)


def findings(results: dict) -> list[PLAIN]:
    """The tables that come first: whether the queries can tell compressors apart, and the claims; where there are any.

    Args:
        results: as `comparison.compare` returns them; earlier versions had neither.
    """
    found = []
    if results.get("discriminates"):
        found.append(_discrimination(results))
    if results.get("claims"):
        found.append(_claims(results["claims"]))
    return found


def _discrimination(results: dict) -> PLAIN:
    budget, rows = results["about"]["merge"]["num_regions"], results["discriminates"]
    sentences = [
        discriminates(rows, section, name, budget)
        for section in ("untouched", "adapted")
        for name in _sets(rows)
        if any(row["of"][0] == section for row in rows)
    ]
    note = (
        " ".join(sentences)
        + "\n\nWhat random and grid, the crudest compressors, lose against all tokens says whether a "
        "difference between compressors can be seen at all."
    )
    head = ["all tokens minus", *(f"{metric}, {SETS[name]}" for name in _sets(rows) for metric in ("R@1", "nDCG@10"))]
    body = [
        [named(row["minus"]), *(_cell(row[name][metric]) for name in _sets(rows) for metric in ("r@1", "ndcg@10"))]
        for row in rows
    ]
    return "Can these queries tell compressors apart?", note, head, body


def discriminates(rows: Sequence[dict], section: str, queries: str, budget: Budget) -> str:
    """A sentence on whether a set of queries tells the crude compressors of a section from all tokens."""
    own = [row for row in rows if row["of"][0] == section]
    by = {row["minus"][1]: [m for m in ("r@1", "ndcg@10") if row[queries][m]["interval"][0] > 0] for row in own}
    seen = [f"{name} (by nDCG@10 alone)" if found == ["ndcg@10"] else name for name, found in by.items() if found]
    can = "can" if len(seen) == len(own) else f"can tell only {seen[0]} from all tokens" if seen else "can't"
    how = "with the projection untouched" if section == "untouched" else "after the same training"
    tell = "" if can.startswith("can tell") else " tell compressors apart"
    alone = [name for name, found in by.items() if found == ["ndcg@10"]]
    by_one = f" ({' and '.join(alone)} by nDCG@10 alone)" if can == "can" and alone else ""
    return f"{SETS[queries].capitalize()} {can}{tell} at K = {budget_words(budget)}, {how}{by_one}."


def _claims(claims: Sequence[dict]) -> PLAIN:
    said = []
    for verdict, words in (("no", "Contrary"), ("undecided", "Undecided"), ("yes", "Holds")):
        for name in _sets(claims):
            found = [claim["claim"] for claim in claims if claim["verdicts"].get(name) == verdict]
            listed = f"{len(found)} of {len(claims)}" if verdict == "undecided" else "; ".join(found) or "none"
            said.append(f"{words}, {SETS[name]}: {listed}.")
    said.append(f"Level with all tokens: not more than half a point below (the interval's lower end). {HOW}")
    head = ["claim", *(part for name in _sets(claims) for part in (SETS[name], f"R@1 difference, {SETS[name]}"))]
    body = []
    for claim in claims:
        cells = [(claim["verdicts"][name], _cell(claim[name]["r@1"])) for name in _sets(claims)]
        body.append([claim["claim"], *(part for pair in cells for part in pair)])
    return "Claims", "\n\n".join(said), head, body


def _sets(entries: Sequence[dict]) -> list[str]:
    return [name for name in SETS if name in entries[0]]


def _cell(test: dict) -> str:
    return difference(test["difference"], test["interval"], test["p"])


def against_controls(results: dict) -> list[PLAIN]:
    """Every row against the control rows of its budget and training, a table per set of queries."""
    entries = results.get("against", [])
    if not entries:
        return []
    at = {(tuple(entry["of"]), entry["minus"][1].partition(" @ ")[0]): entry for entry in entries}
    controls = sorted(dict.fromkeys(control for _, control in at), key=lambda control: control != "none")
    found = []
    for name in _sets(entries):
        body = []
        for of in dict.fromkeys(tuple(entry["of"]) for entry in entries):
            own = [at.get((of, control)) for control in controls]
            cells = [_cell(entry[name]["r@1"]) if entry else "" for entry in own]
            body.append([named(of), *cells])
        head = ["", *(f"minus {'all tokens' if control == 'none' else control}" for control in controls)]
        how = "trained by the same recipe, each through itself, if it is trained; the same K"
        note = f"Each row minus its controls: {how}. {HOW}"
        found.append((f"Against the controls, {SETS[name]}", note, head, body))
    return found


def phrase_tables(results: dict) -> list[PLAIN]:
    """Retrieval by short phrases, of untouched and trained rows, then of budgets."""
    about = results["about"].get("phrases")
    rows = [row for row in results["rows"] if "phrases" in row and row["section"] in ("untouched", "adapted")]
    if not about or not rows:
        return []
    rare = any("rare_phrases" in row for row in rows)
    note = (
        f"{about['count']:,} phrases that have boxes, as typed (lower case, no leading article), of which one image "
        f"holds {about['of_one_image']:,}; the commonest is held by {about['most_images']:,}. Relevant is every image "
        "whose annotation holds the phrase or one that ends in it (a brown dog is a dog; a hot dog counts, too), "
        "with or without a box. Others may show it unnamed by their annotators, and count as wrong: the likelier, the "
        f"more images hold a phrase. So those that at most {about['rare_images']} images hold ({about['rare']:,}) are "
        "also given by themselves as rare. R@k: a relevant image is among the first k; nDCG@10: relevance of all "
        "relevant images is binary; MRR: reciprocal rank of the first relevant one. Intervals: phrases of one image "
        "(the first that holds them) together."
    )
    head = ["", "R@1", "R@5", "R@10", "nDCG@10", "MRR", *(["R@1, rare", "nDCG@10, rare", "MRR, rare"] if rare else [])]
    body = []
    for row in rows:
        own = row["phrases"]
        cells = [recall(own), *(number(own[name]) for name in ("r@5", "r@10", "ndcg@10", "mrr"))]
        if rare:
            few = row["rare_phrases"]
            cells += [recall(few), number(few["ndcg@10"]), number(few["mrr"])]
        body.append([label(row), *cells])
    return [("Short phrases", note, head, body)]


def size_tables(results: dict) -> list[PLAIN]:
    """R@1 by the size of the smallest thing named, in fixed bins, of captions and of phrases."""
    sizes = results["sizes"]
    rows = [row for row in results["rows"] if row["section"] in ("untouched", "adapted") and "r@1_by_bin" in row]
    if not rows or not sizes:
        return []
    edges = [f"{100 * edge:g} %" for edge in sizes["bin_edges"]]
    bins = [f"under {edges[0]}", *(f"{low} to {high}" for low, high in pairwise(edges)), f"from {edges[-1]}"]
    head, counts = [""], []
    for name in ("captions", "phrases"):
        if f"{name}_by_bin" in sizes:
            head += [f"{name}, {each}" for each in bins]
            counts += [f"{count:,}" for count in sizes[f"{name}_by_bin"]]
    body = [["queries", *counts]]
    for row in rows:
        both = [*row["r@1_by_bin"], *(row["phrases"]["r@1_by_bin"] if "phrases" in row else ())]
        body.append([label(row), *map(number, both)])
    note = (
        "R@1 by the share of the picture that the boxes of a phrase cover together: of a caption that of its smallest "
        "phrase, of a phrase the largest in any image that holds it."
    )
    return [("By size", note, head, body)]


def lines_of(tables: Sequence[PLAIN]) -> list[str]:
    """Tables as markdown, each under its heading."""
    return [
        line
        for title, note, head, rows in tables
        for line in ("", f"## {title}", "", note, "", *markdown_table(head, rows))
    ]
