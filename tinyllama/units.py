"""The unit of a metric: how its values are written, and with which others they have a mean.

Only shares (0 to 1: accuracies, F1, pass@k) are percent. BLEU and what some tasks of lm-eval give between 0 and 100 are
points, written as they are; so are bits per byte, perplexities, and every metric whose unit is not known.
"""

from __future__ import annotations

import re
from typing import Any

SHARE, POINTS, OTHER = "share", "points", ""
PARTS = frozenset(
    {
        "acc",
        "accuracy",
        "em",
        "exact",
        "match",
        "f1",
        "pass",
        "precision",
        "recall",
        "mc1",
        "mc2",
        "contains",
        "correct",
    }
)  # of a metric's name, that make it a share
KNOWN = {
    "bits_per_byte": "bits per byte", "bpb": "bits per byte", "byte_perplexity": "perplexity per byte",
    "word_perplexity": "perplexity per word", "perplexity": "perplexity", "ppl": "perplexity", "loss": "nats", "nll": "nats",
    "likelihood_diff": "nats", "loglikelihood": "nats", "bleu": POINTS, "chrf": POINTS, "chrfpp": POINTS, "ter": POINTS,
    "chrf++": POINTS,
    "brier_score": OTHER, "mcc": OTHER, "matthews_corrcoef": OTHER, "anls": SHARE, "extraction_rate": SHARE,
}  # fmt: skip
LOWER_IS_BETTER = frozenset(
    {"bits_per_byte", "bpb", "byte_perplexity", "word_perplexity", "perplexity", "ppl", "loss", "nll", "ter", "wer", "cer",
     "brier_score"}
)  # fmt: skip
IN_POINTS = (
    "squadv2",
    "scrolls_",
)  # lm-eval's tasks whose F1 and exact match are between 0 and 100, even if one is 0.9
NOT_SHARES = ("bert", "bleurt", "diff", "nli")  # in a name: of scales of their own


def unit_of(metric: str | None, *values: float, task: str | None = None) -> str:
    """A metric's unit by its name (None: a share, as published rows are).

    values: the score, and its items' scores; no share is outside of 0 to 1. task: lm-eval's name of it.
    """
    if metric is None:
        return SHARE
    name = metric.partition(",")[0].lower()
    unit = KNOWN.get(name)
    if unit is None:
        parts = {part for part in re.split(r"[^a-z0-9]+", name) if part}
        unit = SHARE if parts & PARTS and not any(word in name for word in NOT_SHARES) else OTHER
    if unit == SHARE and (str(task).startswith(IN_POINTS) or not all(-1e-9 <= value <= 1 + 1e-9 for value in values)):
        return POINTS
    return unit


def of_entry(entry: dict[str, Any]) -> str:
    """Of a task's or a suite's entry in results.json; files from before units were written say the metric's name."""
    known = entry.get("unit")
    return str(known) if known is not None else unit_of(entry.get("metric"), entry["value"], task=entry.get("task"))


def lower_is_better(metric: str) -> bool:
    """Whether a metric of this name is better when it is lower, where the task does not say."""
    return metric.partition(",")[0].lower() in LOWER_IS_BETTER


def scale(unit: str) -> float:
    """What a stored value is multiplied by when it is written: shares are percent."""
    return 100.0 if unit == SHARE else 1.0


def text(value: float, unit: str = SHARE, digits: int = 2, signed: bool = False) -> str:
    """A value without its unit: shares in percent with `digits` decimals, others in about four digits."""
    sign = "+" if signed else ""
    if unit == SHARE:
        return f"{100 * value:{sign}.{digits}f}"
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-4:
        return f"{value:{sign}.3e}"
    return f"{value:{sign}.{2 if size >= 100 else 3 if size >= 1 else 4}f}"


def words(unit: str) -> str:
    """The unit behind a value or in a heading: "percent" of shares, "" where it is not known."""
    return "percent" if unit == SHARE else unit


def difference_words(unit: str) -> str:
    """The unit of a difference: percentage points of shares."""
    return "points" if unit in (SHARE, POINTS) else unit
