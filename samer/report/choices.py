"""The page of a study of what a training takes (samer/compare/choices.py): what holds first, then tables."""

from __future__ import annotations

from collections.abc import Sequence

from samer.report.cells import budget_words, difference, markdown_table

ARMS = {
    "untouched": "untouched projector",
    "all": "all captions",
    "random": "random half",
    "alignment": "half by score alone",
    "cpi": "CPI half",
    "all, mixup": "all captions, midpoint mixup",
}
METRICS = {
    "r@1": "R@1",
    "r@10": "R@10",
    "ndcg@10": "nDCG@10",
    "back:r@1": "image to text R@1",
    "foil:object": "foils: objects",
    "foil:attribute": "foils: attributes",
    "foil:relation": "foils: relations",
}
RULES = {"all": "all captions", "random": "random half", "alignment": "half by score alone", "cpi": "CPI half"}
KEPT = {"captions": 0, "images": 0, "words": 1, "score": 3, "object": 4, "attribute": 4, "relation": 4}  # digits


def page(results: dict) -> str:
    """The whole page, of measured results."""
    about, shares = results["about"], results["about"]["choices"]
    train, count = about["train"], len(about["seeds"])
    foils = ", ".join(f"{number:,} of {kind}s" for kind, number in about["foils"].items())
    lines = [
        "# What a training gains by choosing captions (CPI), and by midpoint mixup",
        "",
        "Written by `scripts/choices.py` from what it measured; what both are, and what of them is our choice, is in "
        f"[METHOD](../../samer/METHOD.md), section 4c. Trained on {about['trained on']} of {about['data']}, measured "
        f"on {about['images']:,} images with {about['captions']:,} captions ({about['measured on']}), compressed to "
        f"{budget_words(about['merge']['num_regions'])} vectors ({about['merge']['compressor']}). Every arm trains the "
        f"projector with the same recipe and as many steps ({train['num_train_epochs']:g} epochs of all captions in "
        f"batches of {train['train_batch_size']}, learning rate {train['learning_rate']:g}); mean of {count} "
        f"seed{'s' * (count != 1)}. CPI keeps {shares['share']:.0%} of all captions, never of the "
        f"{shares['drop']:.0%} with the lowest scores; {shares['replacements']} nonce "
        f"word{'s' * (shares['replacements'] != 1)} a phrase. In percent, 95 % bootstrap intervals over images.",
        "",
        "*Foils*: an image must score higher with its caption than with the same caption in which one phrase is that "
        f"of another image, drawn by lot ({foils}); chance is 50.",
        "",
        "## What holds",
        "",
        "A difference holds where its interval leaves 0 out and every seed agrees; one seed decides nothing.",
        "",
        *(f"- {_sentence(entry)}" for entry in results["differences"]),
        "",
        "## Measured",
        "",
        *_rows(results["rows"]),
        "",
        "## Differences",
        "",
        *_differences(results["differences"]),
        "",
        "## What the rules keep",
        "",
        *_choices(results["choices"]),
    ]
    return "\n".join(lines) + "\n"


def holds(test: dict) -> bool:
    """Whether a difference is one: its interval leaves 0 out, and all of several seeds lie on its side."""
    low, high = test["interval"]
    sign = 1 if low > 0 else -1 if high < 0 else 0
    return bool(sign) and len(test["seeds"]) > 1 and all(sign * value > 0 for value in test["seeds"])


def _sentence(entry: dict) -> str:
    found = [
        f"{METRICS[name]} {difference(entry[name]['difference'], entry[name]['interval'])}"
        for name in METRICS
        if name in entry and holds(entry[name])
    ]
    return f"**{ARMS[entry['of']]}** minus {ARMS[entry['minus']]}: {'; '.join(found) or 'nothing holds'}."


def _rows(rows: Sequence[dict]) -> list[str]:
    names = [name for name in METRICS if name in rows[0]]
    head = ["", *(METRICS[name] for name in names), "alignment", "uniformity"]
    cells = [
        [
            ARMS[row["name"]],
            *(
                f"{row[name]['value']:.1f} [{row[name]['interval'][0]:.1f}, {row[name]['interval'][1]:.1f}]"
                for name in names
            ),
            f"{row['alignment']:.3f}",
            f"{row['uniformity']:.3f}",
        ]
        for row in rows
    ]
    words = "Alignment (0 is best) and uniformity (lower is more even) are of pooled vectors of the split measured."
    return [*markdown_table(head, cells), "", words]


def _interval(shown: dict) -> str:
    low, high = shown["interval"]
    return f"{shown['value']:.1f} [{low:.1f}, {high:.1f}]"


def _differences(entries: Sequence[dict]) -> list[str]:
    names = [name for name in METRICS if name in entries[0]]
    head = ["", *(METRICS[name] for name in names)]
    cells = []
    for entry in entries:
        tests = [entry[name] for name in names]
        marked = [f"**{_told(test)}**" if holds(test) else _told(test) for test in tests]
        cells.append([f"{ARMS[entry['of']]} - {ARMS[entry['minus']]}", *marked])
    words = "With p, and what each seed gave in parentheses; what holds is in bold."
    return [words, "", *markdown_table(head, cells)]


def _told(test: dict) -> str:
    seeds = ", ".join(f"{value:+.1f}" for value in test["seeds"])
    return f"{difference(test['difference'], test['interval'], test['p'])} ({seeds})"


def _choices(found: dict) -> list[str]:
    head = ["", "captions", "images", "words a caption", "score", *(f"drop: {kind}s" for kind in list(KEPT)[4:])]
    cells = [
        [RULES[name], *("" if row[key] is None else f"{row[key]:,.{digits}f}" for key, digits in KEPT.items())]
        for name, row in found["rules"].items()
    ]
    shared, ranks = found["shared by cpi and alignment"], found["rank correlation of cpi and score"]
    return [
        "Means over the captions kept: words, MaxSim score with their own image, and what the score loses when a "
        f"phrase of the type is replaced. The halves by CPI and by score share {shared:.0%}; CPI and score correlate "
        f"in rank by {ranks:+.2f}. Captions without a phrase: {found['without phrases']:,}.",
        "",
        *markdown_table(head, cells),
    ]
