"""The per-item logs of an evaluation: a line for each item and filter, as lm-eval logs it, read as scores of items.

What two evaluations asked alike is found by task, filter, and the hashes of the item and of its whole prompt, never by
`doc_id`: that is a position, and other data, shots or limits put another item there. Items of a task that share a text
(a passage with several questions) are in one cluster.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tinyllama.errors import UserError

# Fields of an item that hold a text with several questions, in lm-eval's tasks: DROP, BoolQ, ReCoRD (passage), MultiRC
# (paragraph), RACE (article), SQuAD, CosmosQA, LogiQA (context), CoQA (story), NLI (premise), Belebele (flores_passage).
SHARED_TEXTS = (
    "passage",
    "paragraph",
    "article",
    "context",
    "story",
    "document",
    "background",
    "flores_passage",
    "premise",
)
PER_UNIT = {
    "bits_per_byte": 1 / math.log(2),
    "byte_perplexity": 1.0,
    "word_perplexity": 1.0,
}  # of (log-likelihood, size)
EXPONENTIALS = frozenset({"byte_perplexity", "word_perplexity", "perplexity"})  # e to the mean of the items' values


class Key(NamedTuple):
    """What makes an item the same in two evaluations. `repeat` counts the equal ones before it: a data set may have some."""

    leaf: str
    filter: str
    doc_hash: str
    prompt_hash: str
    repeat: int


@dataclasses.dataclass(frozen=True)
class Item:
    """One item's score by the headline metric, and its position in the task's rows.

    value: of perplexities in nats. size: its weight in the mean (bytes or words; 1 elsewhere). cluster: hash of the text
    that it shares with other items; None where no such text is known.
    """

    key: Key
    doc_id: int
    value: float
    size: float = 1.0
    cluster: str | None = None

    @property
    def group(self) -> tuple[str, str] | None:
        """The cluster within its leaf task."""
        return None if self.cluster is None else (self.key.leaf, self.cluster)


def text_hash(text: Any) -> str:
    """A cluster's name, from the text or whatever else its items have in common."""
    plain = text if isinstance(text, str) else json.dumps(text, sort_keys=True, default=str)
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def cluster_of(doc: Any, field: str | None = None) -> str | None:
    """The cluster of an item: by the field that is named, else by the first of SHARED_TEXTS that it has as text."""
    if not isinstance(doc, dict):
        return None
    if field is not None:
        return text_hash(doc[field]) if doc.get(field) is not None else None
    found = next((doc[name] for name in SHARED_TEXTS if isinstance(doc.get(name), str) and doc[name]), None)
    return None if found is None else text_hash(found)


def _value(metric: str, entry: dict[str, Any]) -> tuple[float, float] | None:
    """An item's value and weight; None where it has no number for the metric."""
    found = entry.get(metric)
    if metric in PER_UNIT and isinstance(found, list | tuple) and len(found) == 2:
        total, size = float(found[0]), float(found[1])
        return (-total * PER_UNIT[metric] / size, size) if size else None
    if isinstance(found, bool) or not isinstance(found, int | float):
        return (float(found), 1.0) if isinstance(found, bool) else None
    return (-float(found) if metric == "perplexity" else float(found)), 1.0


def items(entries: Iterable[dict[str, Any]], metric_key: str) -> list[Item]:
    """The items of a log by one metric ("acc_norm,none": name and filter). Without what has no number for it; UserError for
    a score that is not finite.
    """
    metric, _, filter_name = metric_key.partition(",")
    seen: Counter[tuple[str, str, str, str]] = Counter()
    found = []
    for entry in entries:
        if entry["filter"] != filter_name or (scored := _value(metric, entry)) is None:
            continue
        value, size = scored
        if not (math.isfinite(value) and math.isfinite(size)):
            raise UserError(
                f"{entry['task']}: item {entry['doc_id']} has {metric} {entry[metric]}",
                fix="check the model's weights for NaN",
            )
        same = (entry["task"], filter_name, entry["doc_hash"], entry["prompt_hash"])
        cluster = entry["cluster"] if "cluster" in entry else cluster_of(entry.get("doc"))
        position = int(entry.get("row", entry["doc_id"]))
        found.append(Item(Key(*same, seen[same]), position, value, size, cluster))
        seen[same] += 1
    return found


def read(path: Path, metric_key: str) -> list[Item]:
    """The items of a log file; UserError names a line that is none."""

    def entries() -> Iterator[dict[str, Any]]:
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    entry = json.loads(line.decode("utf-8"))
                    int(entry.get("row", entry["doc_id"]))
                    yield {k: entry[k] for k in ("task", "filter", "doc_hash", "prompt_hash", "doc_id")} | entry
                except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                    raise UserError(
                        f"{path}:{number} is no sample of an evaluation ({error})", fix="evaluate again"
                    ) from None

    try:
        return items(entries(), metric_key)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", fix="evaluate again") from None
