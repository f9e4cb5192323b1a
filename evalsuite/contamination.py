"""Scores of the items that the training data does not hold, from the report of `tinyllama data contamination`.

The report knows rows of a bundle's files; the evaluation logs which file and row each item came from. Clean is what the
report calls clean: enough tokens to tell, and no run of them in the training data.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evalsuite import aggregate, samples
from evalsuite.samples import Item
from tinyllama.data.contamination import FORMAT
from tinyllama.data.store import file_sha256
from tinyllama.errors import UserError
from tinyllama.units import SHARE

FIX = "give a report of tinyllama data contamination BUNDLE's stores --against BUNDLE, with the --data-dir that is evaluated"


@dataclasses.dataclass(frozen=True)
class Report:
    """A contamination report: the status of each row of each set ("<data set>/<config>/<split>")."""

    path: Path
    ngram: int
    files: dict[str, str]  # of the bundle, with their sha256
    statuses: dict[str, dict[int, str]]

    def origin(self) -> dict[str, Any]:
        """What results.json says of it."""
        return {"report": str(self.path), "sha256": file_sha256(self.path), "ngram": self.ngram}


def load(path: Path, bundle: Path | None) -> Report:
    """Read a report; UserError if it is none, or was made of other files than the bundle's."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--contamination {path} cannot be read ({reason})", fix=FIX) from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"--contamination {path} is not a contamination report", fix=FIX)
    if bundle is None:
        raise UserError(
            "--contamination needs local data: the report names rows of a bundle's files", fix="add --data-dir"
        )
    statuses: dict[str, dict[int, str]] = {}
    try:
        ngram, files = int(found["ngram"]), {str(name): sha256 for name, sha256 in found["bundle"]["files"].items()}
        for item in found["items"]:
            statuses.setdefault(item["set"], {})[item["row"]] = item["status"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"--contamination {path} is not a whole contamination report ({error!r})", fix=FIX) from None
    for name, sha256 in files.items():
        place = Path(name)
        if place.is_absolute() or ".." in place.parts:
            raise UserError(f"--contamination {path} names {name!r}, which is in no bundle", fix=FIX)
        if (bundle / place).is_file() and file_sha256(bundle / place) != sha256:
            raise UserError(f"--contamination {path} was made from another {name}", fix=FIX)
    return Report(path, ngram, files, statuses)


def origins(
    configs: dict[str, Any], sizes: dict[str, Any], asked: dict[str, tuple[list[int], int]] | None = None
) -> dict[str, Any]:
    """For each leaf task the set in a bundle that its items are rows of, and how many there are.

    configs, sizes: lm-eval's `configs` and `n-samples`. asked: of tasks that leave rows out, which, of how many.
    """
    found = {}
    for leaf, config in configs.items():
        split = config.get("test_split") or config.get("validation_split")
        file = ((config.get("dataset_kwargs") or {}).get("data_files") or {}).get(split)
        if isinstance(file, str):
            path = Path(file)
            found[leaf] = {
                "set": f"{path.parent.parent.name}/{path.parent.name}/{path.stem}",
                "rows": asked[leaf][1] if asked and leaf in asked else sizes[leaf]["original"],
            }
    return found


def clean_score(entry: dict[str, Any], found: Sequence[Item], report: Report) -> dict[str, Any]:
    """The score of a benchmark's clean items, and how many items there are of each status.

    An item is "unknown" if the report has no such set, or another number of rows than the task: its positions are then
    not rows.
    """
    origins_of, how = entry.get("origins") or {}, samples.averagings(entry["value"], found, entry.get("metric") or "")
    counts: Counter[str] = Counter(overlap=0, short=0, unknown=entry["n"] - len(found))  # what the log lacks is unknown
    clean = []
    for item in found:
        origin = origins_of.get(item.key.leaf, {"set": None, "rows": 0})
        rows = report.statuses.get(origin["set"], {})
        status = rows.get(item.doc_id, "unknown") if len(rows) == origin["rows"] else "unknown"
        if status == "clean":
            clean.append(item)
        else:
            counts[status] += 1
    exponential = entry.get("metric") in samples.EXPONENTIALS
    score = samples.mean(clean, how[0], aggregate.unit(entry) == SHARE) if how and not exponential else None
    return {
        "value": score.value if score else None,
        "stderr": score.stderr if score else None,
        "ci95": dataclasses.asdict(score.interval) if score and score.interval else None,
        "n": len(clean),
        **counts,
    }


def add_clean_scores(results: dict[str, Any], folder: Path, report: Report) -> None:
    """Give every benchmark of results.json, and every whole suite, the score of its clean items: `clean`."""
    for name, entry in results["tasks"].items():
        path = samples.path_of(folder, name)
        found = samples.read(path, entry["metric_key"]) if path.exists() else []
        entry["clean"] = clean_score(entry, found, report)
    for suite in results["suites"].values():
        parts = [results["tasks"][member]["clean"] for member in suite["benchmarks"]]
        known = all(part["value"] is not None for part in parts)
        suite["clean"] = {
            "value": sum(part["value"] for part in parts) / len(parts) if known else None,
            "n": sum(part["n"] for part in parts),
        }
    results["contamination"] = report.origin()
