"""What a model scores beside what it costs to serve: an evaluation in bench.json, and two benches side by side.

The evaluation is read as the file that `tinyllama eval` wrote; its content hash must be the served model's. A difference
of scores is shown with the paired test of `tinyllama compare`, and the items whose answer changed; `tinyllama compare` does
all of its comparisons, suites too, corrected for their number.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve.bench import Workload
from serve.source import Source
from serve.table import INCOMPLETE
from tinyllama import item_log, strict_json, units
from tinyllama.errors import ConfigError, UserError
from tinyllama.stats.paired import Difference, Pairs, paired
from tinyllama.stats.student import t_quantile

RESULTS_FORMAT = "tinyllama-results-1"
KEPT = ("metric", "metric_key", "value", "stderr", "ci95", "n", "data_sha256", "higher_is_better", "unit")
# What must be the same for two speeds to say anything about two models.
SAME = ("input_tokens", "output_tokens", "eager", "temperature", "prompts_file", "max_model_len")


def scores(results: str, source: Source) -> dict[str, Any]:
    """The part `scores` of bench.json: suites and tasks of a results.json (or its directory). UserError unless it is an
    evaluation of this very model.
    """
    file = Path(results)
    file = file / "results.json" if file.is_dir() else file
    found = strict_json.read_object(
        file, "--scores", missing="make it with: tinyllama eval --model MODEL", error=UserError
    )
    if found.get("format") != RESULTS_FORMAT:
        raise UserError(f"--scores {file} is no evaluation", fix="give what tinyllama eval wrote")
    try:
        return _scores(found, file, source)
    except INCOMPLETE as error:
        raise UserError(f"--scores {file} is incomplete ({error!r})", fix="evaluate again") from None


def _scores(found: dict[str, Any], file: Path, source: Source) -> dict[str, Any]:
    """The part of an evaluation that a bench keeps. UserError for another model's; one of INCOMPLETE for a damaged one."""
    content = source.content()
    if found["content_sha256"] != content:
        raise ConfigError(
            f"--scores {file} is of another model: {found['model']}, {found['content_sha256'][:12]}; "
            f"{source.name} is {content[:12]}",
            fix=f"tinyllama eval --model {source.location}",
        )
    return {
        "results": str(file.resolve()),
        "content_sha256": content,
        "backend": found["backend"],
        "dtype": found["settings"]["dtype"],
        "limit": found["settings"]["limit"],
        "suites": {name: {k: suite.get(k) for k in KEPT if k in suite} for name, suite in found["suites"].items()},
        "tasks": {name: {k: task.get(k) for k in KEPT} for name, task in found["tasks"].items()},
    }


def speed_up(before: Sequence[float], after: Sequence[float]) -> dict[str, float | None]:
    """Ratio of two mean rates with its 95% interval: Student's t on the error of a ratio (delta method), with Welch's
    degrees of freedom. No interval for single repeats.
    """
    means = [math.fsum(values) / len(values) for values in (before, after)]
    ratio = means[1] / means[0]
    if min(len(before), len(after)) < 2:
        return {"mean": ratio, "low": None, "high": None}
    shares = []  # of the squared relative error
    for values, mean in zip((before, after), means, strict=True):
        variance = math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1)
        shares.append((variance / mean**2 / len(values), len(values) - 1))
    total = sum(share for share, _ in shares)
    if not total:
        return {"mean": ratio, "low": ratio, "high": ratio}
    freedom = total**2 / sum(share**2 / n for share, n in shares)
    half = t_quantile(0.95, max(1, math.floor(freedom))) * ratio * math.sqrt(total)
    return {"mean": ratio, "low": ratio - half, "high": ratio + half}


@dataclasses.dataclass(frozen=True)
class Beside:
    """What --scores and --baseline name, read before anything is measured."""

    scores: dict[str, Any] | None
    baseline: dict[str, Any] | None
    name: str | None

    @classmethod
    def load(cls, results: str | None, baseline: str | None, source: Source, workload: Workload) -> Beside:
        """UserError for an evaluation of another model, or a baseline of another workload."""
        from serve.table import load_bench

        found = scores(results, source) if results else None
        earlier = load_bench(baseline) if baseline else None
        if earlier:
            try:
                check_same(earlier, earlier, "")
                rows(earlier, earlier)
                label(earlier)
            except INCOMPLETE as error:  # would be met after the measurement
                raise UserError(
                    f"--baseline {baseline} is incomplete ({error!r})", fix="measure it again with tinyllama serve"
                ) from None
            asked = {key: value for key, value in dataclasses.asdict(workload).items() if key in SAME}
            compare_settings({key: earlier["settings"].get(key) for key in asked}, asked, str(baseline))
        return cls(found, earlier, baseline)

    def kept(self) -> dict[str, Any]:
        """What goes into bench.json."""
        return {"scores": self.scores} if self.scores else {}

    def print(self, bench: dict[str, Any], console: Any) -> None:
        """The comparison with the baseline, if there is one; UserError if it was measured in another way."""
        if self.baseline:
            check_same(self.baseline, bench, str(self.name))
            print_beside(self.baseline, bench, console)


def compare_settings(before: dict[str, Any], after: dict[str, Any], name: str) -> None:
    """UserError where a setting that speed depends on is not the same."""
    for key in SAME:
        if before.get(key) != after.get(key):
            raise UserError(
                f"--baseline {name} was measured with {key}={before.get(key)}, this with {after.get(key)}",
                fix="measure both alike",
            )


def check_same(baseline: dict[str, Any], bench: dict[str, Any], name: str) -> None:
    """UserError unless two benches were measured alike; model, quantization and draft may differ."""
    compare_settings(baseline["settings"], bench["settings"], name)
    pairs: list[tuple[str, Any, Any]] = []
    pairs += [(f"device {key}", baseline["device"].get(key), bench["device"].get(key)) for key in ("name", "cores")]
    pairs.append(("vllm", baseline["versions"]["vllm"], bench["versions"]["vllm"]))
    for key, before, after in pairs:
        if before != after:
            raise UserError(
                f"--baseline {name} was measured with {key}={before}, this with {after}", fix="measure both alike"
            )


@dataclasses.dataclass(frozen=True)
class Changed:
    """The test of a task's items that both models answered; gained and lost: None where items are not right or wrong."""

    test: Difference
    gained: int | None
    lost: int | None

    @property
    def words(self) -> str:
        count = f"{self.test.pairs:,} items"
        if self.gained is not None:
            count = f"{self.gained} gained, {self.lost} lost of {self.test.pairs}"
        return f"{count}, p {self.test.p:.2g}"


def changed(before: dict[str, Any], after: dict[str, Any], task: str) -> Changed | None:
    """What changed between two models' answers; None where the per-item logs are gone or no log of the score's items."""
    unit = units.of_entry(before["tasks"][task])
    logs = [_items(found, task) for found in (before, after)]
    others = {item.key: item.value for item in logs[1]}
    common = [item for item in logs[0] if item.key in others]
    if not common:
        return None
    first, second = [item.value for item in common], [others[item.key] for item in common]
    sizes = [item.size for item in common]
    pairs = Pairs(first, second, 1.0, [i.group for i in common], None if all(s == 1 for s in sizes) else sizes)
    perplexity = before["tasks"][task]["metric"] in item_log.EXPONENTIALS
    found = paired([pairs], unit == units.SHARE and not perplexity)
    if any(value not in (0, 1) for value in (*first, *second)):
        return Changed(found, None, None)
    gained = sum(b > a for a, b in zip(first, second, strict=True))
    return Changed(found, gained, sum(b < a for a, b in zip(first, second, strict=True)))


def _items(found: dict[str, Any], task: str) -> list[item_log.Item]:
    file = Path(found["results"]).parent / "samples" / f"{task}.jsonl"
    return item_log.read(file, found["tasks"][task]["metric_key"]) if file.exists() else []


def rows(baseline: dict[str, Any], bench: dict[str, Any]) -> list[list[str]]:
    """Lines of the comparison: what, before, after, change."""
    from serve.table import number, with_interval

    found = []
    sizes = [_weight_bytes(b) for b in (baseline, bench)]
    if sizes[0] and sizes[1]:
        found.append(["weights, MB", *(f"{size / 1e6:,.1f}" for size in sizes), f"{sizes[1] / sizes[0]:.2f}x"])
    points = {_batch(point): point for point in baseline["throughput"]}
    for point in bench["throughput"]:
        old = points.get(_batch(point))
        if old is None:
            continue
        ratio = speed_up(*([1 / s for s in p["samples_s"]] for p in (old, point)))
        spread = "" if ratio["low"] is None else f" ({ratio['low']:.2f} to {ratio['high']:.2f})"
        cells = [with_interval(p["output_tokens_per_s"]) for p in (old, point)]
        found.append([f"output tok/s, {_batch(point)}", *cells, f"{ratio['mean']:.2f}x{spread}"])
    if "e2e_ms" in baseline["latency"] and "e2e_ms" in bench["latency"]:
        times = [b["latency"]["e2e_ms"]["p50"] for b in (baseline, bench)]
        found.append(["one request, ms, p50", *map(number, times), f"{times[1] / times[0]:.2f}x"])
    return found + score_rows(baseline.get("scores"), bench.get("scores"))


def score_rows(before: dict[str, Any] | None, after: dict[str, Any] | None) -> list[list[str]]:
    """Lines of the suites and tasks that both evaluations have, of the same data and metric."""
    if not before or not after:
        return []
    found = []
    for name in before["suites"].keys() & after["suites"].keys():
        suites = [scored["suites"][name] for scored in (before, after)]
        if units.of_entry(suites[0]) == units.of_entry(suites[1]):
            found.append(_score_row(f"{name}, mean", suites[0], suites[1], ""))
    for name, old in before["tasks"].items():
        new = after["tasks"].get(name)
        if new is None or any(old[key] != new[key] for key in ("metric_key", "data_sha256", "n")):
            continue
        flips = changed(before, after, name)
        found.append(_score_row(f"{name}, {old['metric']}", old, new, f"; {flips.words}" if flips else ""))
    return found


def _score_row(name: str, old: dict[str, Any], new: dict[str, Any], more: str) -> list[str]:
    """Name with its unit, both values and their difference."""
    unit = units.of_entry(old)
    values = [found["value"] for found in (old, new)]
    words = "%" if unit == units.SHARE else units.words(unit)
    heading = name if words in ("", name.rpartition(", ")[2].replace("_", " ")) else f"{name} {words}"
    change = units.text(values[1] - values[0], unit, 1, signed=True)
    return [heading, *(units.text(value, unit, 1) for value in values), f"{change}{more}"]


def _batch(point: dict[str, Any]) -> str:
    """What was sent together."""
    many = point.get("samples_per_prompt", 1)
    sent = f"batch {point['batch_size']}{f' x {many}' if many > 1 else ''}"
    return f"{sent}, {point['input_tokens']}x{point['output_tokens']}"


def _weight_bytes(bench: dict[str, Any]) -> int:
    return (bench.get("roofline") or {}).get("weight_bytes") or 0


def print_beside(baseline: dict[str, Any], bench: dict[str, Any], console: Any) -> None:
    """The comparison as a table, and what tests the scores."""
    from rich.markup import escape
    from rich.table import Table

    names = [escape(label(b)) for b in (baseline, bench)]
    table = Table(title=f"{names[1]} beside {names[0]}")
    for index, heading in enumerate(("", *names, "change")):
        table.add_column(heading, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows(baseline, bench):
        table.add_row(*map(escape, row))
    console.print(table)
    note = "Speed-up with its 95% interval over the repeats of both."
    if baseline.get("scores") and bench.get("scores"):
        folders = [str(Path(b["scores"]["results"]).parent) for b in (baseline, bench)]
        note += f" p: paired test of the items, uncorrected. All of it: tinyllama compare {' '.join(folders)}"
    else:
        note += " Scores: give --scores to both."
    console.print(note, style="dim", highlight=False, markup=False, soft_wrap=True)


def label(bench: dict[str, Any]) -> str:
    """Name of a bench: the model, its scheme, its draft."""
    model, draft = bench["model"], bench["settings"].get("draft")
    parts = [model["name"]]
    if model.get("quantization") and model["quantization"]["scheme"] not in model["name"]:
        parts.append(model["quantization"]["scheme"])
    if draft:
        parts.append(f"draft {draft['name']} x{draft['num_tokens']}")
    return ", ".join(parts)
