"""Clean-subset scores: by the report's rows, and only where the report is about these rows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from evalsuite import contamination, samples
from tinyllama.data.store import file_sha256
from tinyllama.errors import UserError
from tinyllama.item_log import Item, Key

SET = "baber__piqa/default/validation"
STATUSES = ["clean", "overlap", "clean", "short", "clean"]


@pytest.fixture
def bundle(tmp_path) -> Path:
    path = tmp_path / "bundle" / f"{SET}.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(f'{{"row": {i}}}\n' for i in range(len(STATUSES))))
    return tmp_path / "bundle"


def write(folder: Path, bundle: Path, **changes: Any) -> Path:
    """A report as `tinyllama data contamination` writes it."""
    content = {
        "format": "tinyllama-contamination-1",
        "ngram": 13,
        "bundle": {"path": str(bundle), "files": {f"{SET}.jsonl": file_sha256(bundle / f"{SET}.jsonl")}},
        "items": [{"set": SET, "row": row, "status": status} for row, status in enumerate(STATUSES)],
        **changes,
    }
    (folder / "report.json").write_text(json.dumps(content))
    return folder / "report.json"


def evaluated(values: list[float], origins: dict[str, Any] | None) -> tuple[dict[str, Any], list[Item]]:
    # In another order than the rows, as several ranks log them.
    found = [Item(Key("piqa", "none", f"d{i}", f"p{i}", 0), i, value) for i, value in reversed(list(enumerate(values)))]
    return {"value": sum(values) / len(values), "n": len(values), "origins": origins}, found


def test_clean_items_are_scored_by_row(bundle, tmp_path):
    report = contamination.load(write(tmp_path, bundle), bundle)
    origins = {"piqa": {"set": SET, "rows": 5}}
    score = contamination.clean_score(*evaluated([1, 1, 0, 1, 0], origins), report)
    assert score["value"] == pytest.approx(1 / 3)
    assert [score[k] for k in ("n", "overlap", "short", "unknown")] == [3, 1, 1, 0]
    assert score["ci95"]["method"] == "wilson"
    # With a limit, the first rows.
    score = contamination.clean_score(*evaluated([0, 1], origins), report)
    assert (score["value"], score["n"], score["overlap"]) == (0, 1, 1)
    # None left.
    spoilt = dataclasses.replace(report, statuses={"spoilt": dict.fromkeys(range(5), "overlap")})
    score = contamination.clean_score(*evaluated([1, 1, 0, 1, 0], {"piqa": {"set": "spoilt", "rows": 5}}), spoilt)
    assert (score["value"], score["ci95"], score["n"]) == (None, None, 0)


@pytest.mark.parametrize(
    "origins", [None, {"piqa": {"set": "other/default/test", "rows": 5}}, {"piqa": {"set": SET, "rows": 9}}]
)
def test_items_that_the_report_does_not_know_are_counted(bundle, tmp_path, origins):
    """No origin, another set, or a task that left rows out so that positions are no rows."""
    report = contamination.load(write(tmp_path, bundle), bundle)
    score = contamination.clean_score(*evaluated([1, 1, 0, 1, 0], origins), report)
    assert (score["value"], score["n"], score["unknown"]) == (None, 0, 5)


def test_a_missing_log_is_unknown(bundle, tmp_path):
    report = contamination.load(write(tmp_path, bundle), bundle)
    entry, found = evaluated([1, 1, 0, 1, 0], {"piqa": {"set": SET, "rows": 5}})
    assert contamination.clean_score(entry, found[:2], report)["value"] is None
    results = {"tasks": {"piqa": {**entry, "metric_key": "acc,none"}}, "suites": {"one": {"benchmarks": ["piqa"]}}}
    contamination.add_clean_scores(results, tmp_path, report)
    assert results["tasks"]["piqa"]["clean"]["unknown"] == 5
    assert results["suites"]["one"]["clean"] == {"value": None, "n": 0}
    assert results["contamination"]["ngram"] == 13


def test_origins_are_read_from_lm_evals_configs():
    config = {
        "test_split": None,
        "validation_split": "validation",
        "dataset_kwargs": {"data_files": {"train": "/b/x/y/train.jsonl", "validation": f"/b/{SET}.jsonl"}},
    }
    found = contamination.origins({"piqa": config, "hub": {"test_split": "test"}}, {"piqa": {"original": 24}})
    assert found == {"piqa": {"set": SET, "rows": 24}}


def test_a_mean_of_leaf_means_stays_one(bundle, tmp_path):
    """Where a score is the mean of its leaf tasks' means, so is that of its clean items."""
    items = [Item(Key("a", "none", f"d{i}", "p", 0), i, v) for i, v in enumerate([1, 0, 1, 1, 0])]
    items += [Item(Key("b", "none", f"d{i}", "p", 0), i, v) for i, v in enumerate([0, 1, 0])]
    assert samples.averagings((3 / 5 + 1 / 3) / 2, items) == ("leaves",)
    report = contamination.load(write(tmp_path, bundle), bundle)
    both = {"a": {"set": SET, "rows": 5}, "b": {"set": SET, "rows": 5}}
    entry = {"value": (3 / 5 + 1 / 3) / 2, "n": 8, "origins": both}
    assert contamination.clean_score(entry, items, report)["value"] == pytest.approx((2 / 3 + 0) / 2)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), ("{", "cannot be read"), ("[]", "not a contamination report"), ("{}", "not a contam")],
)
def test_a_bad_report_is_one_line(bundle, tmp_path, content, words):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words):
        contamination.load(path, bundle)


def test_a_report_of_other_data_is_refused(bundle, tmp_path):
    path = write(tmp_path, bundle)
    with pytest.raises(UserError, match="add --data-dir"):
        contamination.load(path, None)
    (bundle / f"{SET}.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=f"made from another {SET}.jsonl"):
        contamination.load(path, bundle)
