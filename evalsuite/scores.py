"""Rows of a comparison: a results file of `tinyllama eval`, or a published row, as scores and their conditions.

Nothing is tested here. `setting` and `departures` say in words what is not the same about two scores of one benchmark.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from evalsuite import aggregate, published, samples
from evalsuite.suites import PAPER, PAPER_TEMPERATURE, SUITES
from evalsuite.table import load_results
from tinyllama.errors import UserError, nearest
from tinyllama.stats.intervals import Estimate, Interval, combined, wilson
from tinyllama.units import SHARE

PUBLISHED = "published:"
Log = tuple[list[samples.Item], tuple[samples.Averaging, ...]]
MINI = "mini"  # the bundle that is not the real data


@dataclasses.dataclass(frozen=True)
class Score:
    """A model's value of a benchmark or a suite. value, stderr, interval: in `unit`, shares as parts of 1.

    metric, num_fewshot: None where the protocol says it in words. data_sha256: of the rows that were asked, None where it is
    not known. estimate: what a test without items needs, None of suites. limit: at most so many items of each task. dtype:
    that the model was computed in, None where it is not known.
    """

    value: float
    stderr: float | None
    interval: Interval | None
    n: int | None
    protocol: str
    metric: str | None = None
    metric_key: str = ""
    num_fewshot: int | None = None
    limit: int | None = None
    bundle: str | None = None
    dtype: str | None = None
    data_sha256: str | None = None
    higher_is_better: bool = True
    low_confidence: bool = False
    clean: dict[str, Any] | None = None
    unit: str = SHARE
    estimate: Estimate | None = None


@dataclasses.dataclass(frozen=True)
class Model:
    """A row. suites: the benchmarks that each suite's mean is made of. folder: where per-item logs may lie."""

    name: str
    source: str
    tokens: float | None
    scores: dict[str, Score]
    suites: dict[str, list[str]]
    folder: Path | None = None
    low_confidence: bool = False

    def log(self, task: str) -> Log:
        """The logged items of a score, and which means of them it is; nothing where there is no log."""
        score = self.scores[task]
        path = samples.path_of(self.folder, task) if self.folder else None
        if path is None or not path.exists():
            return [], ()
        found = samples.read(path, score.metric_key)
        return found, samples.averagings(score.value, found, score.metric or "")


def load(name: str) -> Model:
    """A row from a results.json, its folder, or `published:` and a model's name. UserError if there is none."""
    if name.startswith(PUBLISHED):
        return _published(name.removeprefix(PUBLISHED))
    path = Path(name) / "results.json" if Path(name).is_dir() else Path(name)
    results = load_results(path)
    try:
        return _measured(path, results)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{path} is not a whole results file ({error!r})", fix="evaluate again") from None


def _measured(path: Path, results: dict[str, Any]) -> Model:
    settings = results["settings"]
    same = {"limit": settings.get("limit"), "bundle": settings.get("data_dir"), "dtype": settings.get("dtype")}
    version = results["versions"]["lm_eval"]

    def score(entry: dict[str, Any], **more: Any) -> Score:
        interval = Interval(**entry["ci95"]) if entry.get("ci95") else None
        protocol = f"{entry['protocol']} (lm-eval {version}{_drawn(entry)})"
        higher, unit = entry.get("higher_is_better", True), aggregate.unit(entry)
        if not math.isfinite(entry["value"]):
            raise UserError(f"{path} has a score of {entry['value']}", fix="evaluate again")
        return Score(
            entry["value"], entry["stderr"], interval, entry.get("n"), protocol,
            higher_is_better=higher, clean=entry.get("clean"), unit=unit, **same, **more,
        )  # fmt: skip

    scores = {
        task: score(
            entry,
            metric=entry["metric"],
            metric_key=entry["metric_key"],
            num_fewshot=entry["num_fewshot"],
            data_sha256=entry.get("data_sha256"),
            estimate=aggregate.whole(entry),
        )
        for task, entry in results["tasks"].items()
    }
    suites = {}
    for suite, entry in results["suites"].items():
        members = entry.get("benchmarks") or [member.name for member in SUITES[suite]]
        if (
            "unit" not in entry
        ):  # of a file from before suites of several units were refused, with too narrow an interval
            entry = {**entry, **(aggregate.suite_mean(results["tasks"], members) or {"unit": None})}
        if entry["unit"] is not None:
            scores[suite], suites[suite] = score(entry), members
    return Model(Path(results["model"]).name, str(path), results.get("tokens"), scores, suites, path.parent)


def _drawn(entry: dict[str, Any]) -> str:
    """How programs were drawn, where that is not what their protocol says."""
    if not str(entry.get("metric")).startswith("pass@"):
        return ""
    settings, count = entry.get("generation") or {}, entry.get("samples_per_problem", 1)
    temperature = settings.get("temperature", 0.0) if settings.get("do_sample") else 0.0
    if count == 1 and temperature == (PAPER_TEMPERATURE if entry["protocol"] == PAPER else 0.0):
        return ""
    return f", {count} completion{'s' if count > 1 else ''} at temperature {temperature:g}"


def _published(name: str) -> Model:
    rows = [row for row in published.rows() if row.model == name]
    if not rows:
        known = list(dict.fromkeys(row.model for row in published.rows()))
        raise UserError(f"{PUBLISHED}{name} is no published row", fix=nearest(name, known))
    scores = {}
    for row in rows:
        for task, percent in row.values.items():
            value, count = percent / 100, published.ITEMS[task]
            # Nobody printed errors. Of scores between 0 and 1 with one mean, right and wrong answers vary the most.
            stderr, interval = math.sqrt(value * (1 - value) / count), wilson(value * count, count)
            low, exact = row.is_low(task), Estimate(value, stderr, count, math.inf, count)
            scores[task] = Score(value, stderr, interval, count, row.protocol, low_confidence=low, estimate=exact)
        average = row.average_printed if row.average_printed is not None else row.average_recomputed
        parts = [scores[task] for task in row.values]
        estimates = [part.estimate for part in parts if part.estimate]
        of_cells, error, around = combined([1 / len(parts)] * len(parts), estimates)
        if around:  # printed averages are not always those of their cells
            off = average / 100 - of_cells
            around = dataclasses.replace(around, low=around.low + off, high=around.high + off)
        low = any(part.low_confidence for part in parts)
        scores[row.suite] = Score(average / 100, error, around, None, row.protocol, low_confidence=low)
    suites = {row.suite: list(row.values) for row in rows}
    confidence = all(row.confidence == "low" for row in rows)
    return Model(name, f"{PUBLISHED}{name}", rows[0].tokens, scores, suites, low_confidence=confidence)


def family(protocol: str) -> str:
    """Scores of one family mean the same, up to versions: lm-eval's prompts and scoring, or instruct-eval's."""
    first = protocol.partition(" ")[0].strip(":,")
    return {"lm-eval": "harness", "instruct-eval": "paper"}.get(first, first)


def _differ(a: Any, b: Any) -> bool:
    """Whether two conditions are known and not the same."""
    return a is not None and b is not None and a != b


def other_sense(score: Score, first: Score) -> str | None:
    """Why two scores do not mean the same, so that no test of their difference means anything; None if they do."""
    if family(score.protocol) != family(first.protocol):
        return "other protocol"
    if _differ(score.metric, first.metric):
        return "other metric"
    if score.unit != first.unit:
        return "other unit"
    if score.higher_is_better != first.higher_is_better:
        return "other direction"
    if _differ(score.num_fewshot, first.num_fewshot):
        return "other shots"
    return None


def other_data(score: Score, first: Score) -> bool:
    """Whether two scores are of other rows. The project's small bundle is never the real data."""
    return _differ(score.data_sha256, first.data_sha256) or (score.bundle == MINI) != (first.bundle == MINI)


def setting(score: Score) -> str:
    """What a score was measured with, in words."""
    limit = f", at most {score.limit} items of each task" if score.limit else ""
    data = f", data {score.bundle}" if score.bundle else ""
    return f"protocol {score.protocol}{limit}{data}"


def departures(score: Score, first: Score) -> list[str]:
    """What else is not the same about two scores of a benchmark."""
    found = []
    if _differ(score.metric, first.metric):
        found.append(f"metric {score.metric}")
    if _differ(score.num_fewshot, first.num_fewshot):
        found.append(f"{score.num_fewshot} shots")
    if _differ(score.dtype, first.dtype):
        found.append(f"computed in {score.dtype}")
    if other_data(score, first):
        found.append("other data")
    return found
