"""Benches beside the first one: for every configuration that both measured, the difference of means, and whether it counts.

A sample is what one repeat gave: a rate, or a mean latency; for the offline latency, one request. Repeats of one bench
share a load of the model and a machine, so their spread covers the noise of that minute; what else differs (device,
versions, model, settings) is listed, because the test cannot tell its effect from that of the change that is looked for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from serve.online import label
from serve.table import INCOMPLETE, load_bench
from tinyllama.errors import UserError
from tinyllama.stats.means import ALPHA, Welch, holm, welch

ONLINE_LATENCIES = {"ttft_ms": "TTFT, ms", "tpot_ms": "TPOT, ms", "itl_ms": "ITL, ms", "e2e_ms": "whole request, ms"}
SINGLE_LATENCIES = {"ttft_s": "TTFT, ms", "tpot_s": "TPOT, ms", "e2e_s": "whole request, ms"}
OUTPUT_RATE = "output tok/s"
GOODPUT = "goodput, req/s"
HIGHER_IS_BETTER = (OUTPUT_RATE, GOODPUT)


@dataclasses.dataclass(frozen=True)
class Bench:
    """A bench.json as it is compared: for each (configuration, metric) its samples, and what could explain a difference."""

    name: str
    source: str
    values: dict[tuple[str, str], list[float]]
    circumstances: dict[str, Any]
    failures: dict[str, str] = dataclasses.field(default_factory=dict)  # loads of which requests failed: how many
    unfinished: dict[str, str] = dataclasses.field(default_factory=dict)  # loads of which repeats are missing: how many


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One metric of one configuration, beside the first bench's. test: None where a repeat alone has no spread."""

    bench: str
    configuration: str
    metric: str
    first: float
    value: float
    samples: tuple[int, int]
    test: Welch | None
    p_holm: float | None = None

    @property
    def change(self) -> float:
        """The difference as a share of the first bench's value."""
        return (self.value - self.first) / self.first if self.first else math.nan

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of `change`, uncorrected."""
        return (self.test.low / self.first, self.test.high / self.first) if self.test and self.first else None

    @property
    def gain(self) -> float:
        """The change, positive if it is for the better."""
        return self.change if self.metric in HIGHER_IS_BETTER else -self.change

    @property
    def significant(self) -> bool:
        return self.p_holm is not None and self.p_holm < ALPHA

    @property
    def verdict(self) -> str:
        """In words."""
        if self.test is None:
            return "not tested: one repeat"
        return ("better" if self.gain > 0 else "worse") if self.significant else "within noise"


@dataclasses.dataclass(frozen=True)
class Report:
    """The benches in the order given, all comparisons with the first, and what each does not share with it."""

    benches: list[Bench]
    comparisons: list[Comparison]

    @property
    def failures(self) -> list[str]:
        """Loads of which requests failed, in any bench."""
        return [f"{bench.name}, {load}: {text}" for bench in self.benches for load, text in bench.failures.items()]

    @property
    def unfinished(self) -> list[str]:
        """Loads that were asked for and not measured as often as that, in any bench: it was interrupted."""
        return [f"{bench.name}, {load}: {text}" for bench in self.benches for load, text in bench.unfinished.items()]

    def of(self, bench: Bench) -> list[Comparison]:
        return [c for c in self.comparisons if c.bench == bench.name]

    def differing(self, bench: Bench) -> list[str]:
        """Circumstances that are not the first bench's, in words."""
        first = self.benches[0].circumstances
        names = dict.fromkeys([*first, *bench.circumstances])
        return [
            f"{name}: {_plain(first.get(name))} → {_plain(bench.circumstances.get(name))}"
            for name in names
            if first.get(name) != bench.circumstances.get(name)
        ]

    def only_in(self, one: Bench, other: Bench) -> list[str]:
        """Configurations that `other` has not measured."""
        known = {configuration for configuration, _ in other.values} | other.failures.keys() | other.unfinished.keys()
        return list(dict.fromkeys(configuration for configuration, _ in one.values if configuration not in known))


def _plain(value: Any) -> str:
    return "none" if value is None else f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)


def load(path: str, name: str) -> Bench:
    """Read a bench.json or its folder; UserError if it is none, or holds no measurement."""
    bench = load_bench(path)
    try:
        _check_points(bench)
        failures = _failures(bench)
        values = {**_offline(bench), **_online(bench, failures)}
        circumstances, unfinished = _circumstances(bench), _unfinished(bench, failures)
    except INCOMPLETE as error:
        raise UserError(f"{path} is incomplete ({error!r})", fix="measure again with tinyllama serve") from None
    if not values:
        what = "".join(f": {load}: {text}" for load, text in list(failures.items())[:1])
        raise UserError(f"{path} holds no finished measurement{what}", fix="measure again with tinyllama serve")
    return Bench(name, path, values, circumstances, failures, unfinished)


def _number(value: Any, least: float = 1e-12) -> float:
    """A measured time or rate: ValueError for what is none."""
    if type(value) not in (int, float) or not least <= value < math.inf:
        raise ValueError(f"{value!r} is no time and no rate")
    return float(value)


def _count(value: Any, least: int = 0) -> int:
    """A number of requests or tokens: ValueError for what is none."""
    if type(value) is not int or value < least:
        raise ValueError(f"{value!r} is no count")
    return value


def _check_points(bench: dict[str, Any]) -> None:
    """ValueError for points that no measurement gives, and for one that stands there twice: which one?"""
    offline, online = bench["throughput"], (bench.get("online") or {"points": []})["points"]
    if not isinstance(offline, list) or not isinstance(online, list):
        raise ValueError("its points are no list")
    seen = []
    for point in offline:
        sizes = (
            *(point[key] for key in ("batch_size", "input_tokens", "output_tokens")),
            point.get("samples_per_prompt", 1),
        )
        seen.append(tuple(_count(size, least=1) for size in sizes))
        if not isinstance(point["samples_s"], list) or not point["samples_s"]:
            raise ValueError("a batch without samples")
    for point in online:
        for key in ("failed", "completed"):
            _count(point[key] or 0)
        if point["kind"] not in ("rate", "concurrency") or point["status"] not in ("done", "failed", "not run"):
            raise ValueError(f"a point of kind {point['kind']!r} and status {point['status']!r}")
        if point["value"] != "inf":
            _number(point["value"])
        seen.append((point["kind"], point["value"], _count(point["repeat"])))
    if online:
        _count(bench["online"]["settings"]["requests"], least=1)
    if len(set(seen)) < len(seen):
        raise ValueError(f"{next(key for key in seen if seen.count(key) > 1)} stands there twice")


def _load_of(online: dict[str, Any], point: dict[str, Any]) -> str:
    """A point's load and its requests, in words: what two points must share to be compared."""
    settings = online["settings"]
    what = f"{settings['input_tokens']}x{settings['output_tokens']}, {settings['requests']} requests"
    if settings["max_in_flight"]:
        what += f", {settings['max_in_flight']} in flight at most"
    return f"{label(point)}, {what}"


def _failures(bench: dict[str, Any]) -> dict[str, str]:
    """Each load of which requests failed, and how many did."""
    online = bench.get("online") or {"points": []}
    counts: dict[str, list[int]] = {}
    for point in online["points"]:
        sent, done = online["settings"]["requests"], point["completed"]
        lost = max(point["failed"] or 0, 0 if done is None else sent - done)
        if lost or point["status"] == "failed":
            sums = counts.setdefault(_load_of(online, point), [0, 0])
            sums[0] += lost
            sums[1] += sent
    found = {load: f"{lost:,} of {sent:,} requests failed" for load, (lost, sent) in counts.items()}
    if lost := _count((online.get("max_rate_under_slo") or {}).get("failed_requests") or 0):
        found["the search for the highest rate"] = f"{lost:,} requests failed"
    return found


def _unfinished(bench: dict[str, Any], failures: Collection[str]) -> dict[str, str]:
    """Each load of which repeats that the settings name are not there, because something stopped the sweep or somebody
    took them out; those with failures say that instead.
    """
    online = bench.get("online") or {"points": []}
    found: dict[str, str] = {}

    def look(load: str, run: int, asked: Any) -> None:
        if asked is not None and run < _count(asked) and load not in failures:
            found[load] = f"{asked - run} of {asked} repeats were not run"

    runs: dict[str, list[bool]] = {}
    for point in online["points"]:
        runs.setdefault(_load_of(online, point), []).append(point["status"] != "not run")
    for load, run in runs.items():
        look(load, sum(run), online["settings"].get("repeats", len(run)))
    for point in bench["throughput"]:
        look(_batch_of(point), len(point["samples_s"]), bench["settings"].get("repeats"))
    return found


def _batch_of(point: dict[str, Any]) -> str:
    """An offline point in words."""
    many = point.get("samples_per_prompt", 1)
    lengths = f"{point['input_tokens']}x{point['output_tokens']}"
    return f"batch {point['batch_size']}{f', n={many}' if many > 1 else ''}, {lengths}"


def _refuse_another(said: Any, samples: Sequence[float], what: str) -> None:
    """ValueError where a mean that a bench says is not that of its samples: its tables would show what is not compared."""
    mean = math.fsum(samples) / len(samples)
    if said is not None and not math.isclose(said["mean"], mean, rel_tol=1e-3, abs_tol=0.01):
        raise ValueError(f"the mean {what} is {said['mean']:.6g}, of its samples {mean:.6g}")


def _offline(bench: dict[str, Any]) -> dict[tuple[str, str], list[float]]:
    found: dict[tuple[str, str], list[float]] = {}
    for point in bench["throughput"]:
        name = _batch_of(point)
        tokens = point["batch_size"] * point.get("samples_per_prompt", 1) * point["output_tokens"]
        rates = [tokens / _number(seconds) for seconds in point["samples_s"]]
        _refuse_another(point.get("output_tokens_per_s"), rates, f"{OUTPUT_RATE} of {name}")
        found[name, OUTPUT_RATE] = rates
    settings = bench["settings"]
    for key, metric in SINGLE_LATENCIES.items():
        seconds = bench["latency"]["samples"].get(key)
        if seconds:
            name = f"one request, {settings['input_tokens']}x{settings['output_tokens']}"
            found[name, metric] = [1e3 * _number(s) for s in seconds]
            said = bench["latency"].get(f"{key.removesuffix('_s')}_ms")
            _refuse_another(said, found[name, metric], f"{metric} of {name}")
    return found


def _online(bench: dict[str, Any], failures: Collection[str]) -> dict[tuple[str, str], list[float]]:
    """The finished points. A load of which requests failed is left out, with its other repeats: they are the lucky ones."""
    online = bench.get("online") or {"points": []}
    found: dict[tuple[str, str], list[float]] = {}
    for point in online["points"]:
        load = _load_of(online, point)
        if point["status"] != "done" or load in failures:
            continue
        values = {metric: point[key]["mean"] for key, metric in ONLINE_LATENCIES.items() if point[key]}
        for key in ("ttft", "e2e"):
            if raw := (point["samples"] or {}).get(f"{key}_s"):
                _refuse_another(point[f"{key}_ms"], [1e3 * _number(s, 0) for s in raw], f"{key} at {load}")
        if point["kind"] == "concurrency" or point["value"] == "inf":  # else the arrivals set it, not the server
            values[OUTPUT_RATE] = point["output_tokens_per_s"]
        if point["goodput_rps"] is not None:
            values[GOODPUT] = point["goodput_rps"]
        for metric, value in values.items():
            found.setdefault((load, metric), []).append(_number(value, least=0))
    return found


def _circumstances(bench: dict[str, Any]) -> dict[str, Any]:
    """All that a bench records besides what was measured, when and where it lies: any of it could make a difference."""
    model, settings = bench["model"], bench["settings"]
    found = {"model": model["name"], "parameters": model["num_parameters"]}
    found["content"] = settings.get("model_sha256") or model["content_sha256"]
    found |= {name: model.get(name) for name in ("step", "trained_tokens", "quantization", "config")}
    found |= {f"device {key}": value for key, value in bench["device"].items()}
    found |= {f"version of {key}": value for key, value in bench["versions"].items()}
    found |= {key: value for key, value in settings.items() if key not in ("model_sha256", "quantization")}
    online = bench.get("online")
    if online:
        asked = dict(online["settings"])
        found["slo"] = asked.pop("slo")
        engine = asked.pop("engine", None) or {}
        found |= {f"server's {key}": value for key, value in engine.items() if settings.get(key) != value}
        found |= {
            f"online {key}": value for key, value in asked.items() if key not in ("model_sha256", "device", "vllm")
        }
    return {key: value for key, value in found.items() if value is not None}


def names(sources: Sequence[str]) -> list[str]:
    """Short names: the folder of each bench.json, or the whole path where two would be alike."""
    folders = [path.parent if path.name == "bench.json" else path for path in map(Path, sources)]
    short = [folder.name or str(folder) for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def compare(sources: Sequence[str]) -> Report:
    """Load every bench and test what it shares with the first. UserError for what cannot be read or compared."""
    called = names(sources)
    if len(set(called)) < len(called):
        raise UserError(f"{next(n for n in called if called.count(n) > 1)} is given twice", fix="give each bench once")
    benches = [load(source, name) for source, name in zip(sources, called, strict=True)]
    first, comparisons = benches[0], []
    for bench in benches[1:]:
        same_slo = first.circumstances.get("slo") == bench.circumstances.get("slo")
        for key, before in first.values.items():
            after = bench.values.get(key)
            if after is None or (key[1] == GOODPUT and not same_slo):
                continue
            test = welch(before, after) if min(len(before), len(after)) > 1 else None
            means = (math.fsum(before) / len(before), math.fsum(after) / len(after))
            comparisons.append(Comparison(bench.name, *key, *means, (len(before), len(after)), test))
    corrected = iter(holm([c.test.p for c in comparisons if c.test]))
    comparisons = [dataclasses.replace(c, p_holm=next(corrected)) if c.test else c for c in comparisons]
    return Report(benches, comparisons)


def drops(report: Report, percent: float) -> list[Comparison]:
    """Throughputs that are lower than the first's by more than `percent`, and significantly so.

    UserError if a bench has none that could be tested: a gate that looked at nothing must not pass.
    """
    if len(report.benches) < 2:
        raise UserError("--fail-if-drop needs two results", fix="give the one to compare with first")
    failed = []
    for bench in report.benches[1:]:
        rates = [c for c in report.of(bench) if c.metric == OUTPUT_RATE and c.test]
        if not rates and (report.failures or report.unfinished):
            continue  # which is reason enough for the gate
        if not rates:
            raise UserError(
                f"--fail-if-drop cannot judge {bench.name}: no throughput was measured alike, with repeats, in both",
                fix="measure both with the same --batch-sizes, lengths and at least 2 --repeats",
            )
        failed += [c for c in rates if c.significant and -100 * c.change > percent]
    return failed
