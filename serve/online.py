"""Latency under load: a sweep of Poisson request rates and of concurrency limits on vLLM's server, and what it says.

The load is sent and timed by vLLM's own benchmark (`client`); the server (`server.private`) is this process's alone.
Here are the order (repeats round-robin over the points, so that a slow minute hits all of them), what is kept when the
server dies or somebody interrupts, and the `online` part of bench.json.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from subprocess import Popen
from typing import TYPE_CHECKING, Any

from serve import samples, slo
from tinyllama.errors import ConfigError

if TYPE_CHECKING:
    from serve.client import Load, Result
    from serve.server import Private

PERCENTILES = (50, 90, 95, 99)
LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "e2e_with_queue_ms")
RATES = ("requests_per_s", "output_tokens_per_s", "goodput_rps")
WARMUP = "as many requests as can run at once"  # fewer, and the first burst of a point meets a cold server
MAX_SEQUENCES = 256
GRACE_S = 10  # that a server whose requests fail gets to end, or to say that it is well


class ServerDied(Exception):
    """The server was gone in the middle of a sweep. What was finished has been written."""


@dataclasses.dataclass(frozen=True)
class OnlineWorkload:
    """The sweep: Poisson rates in requests per second (inf: all at once), concurrency limits, and what each point sends."""

    rates: tuple[float, ...] = (4.0, 16.0, math.inf)
    concurrency: tuple[int, ...] = (1, 4, 16)
    requests: int = 24
    repeats: int = 3
    input_tokens: int = 64
    output_tokens: int = 64
    seed: int = 0
    max_in_flight: int | None = None
    objective: slo.Objective | None = None
    slo_share: float = 0.99
    find_max_rate: bool = False

    def __post_init__(self) -> None:
        for name in ("requests", "max_in_flight"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value}", fix="give at least 1")
        if self.repeats < 1:
            raise ConfigError(f"--online-repeats {self.repeats}", fix="give at least 1")
        if not 0 < self.slo_share <= 1:
            raise ConfigError(f"--slo-share {self.slo_share:g}", fix="give a share of the requests, such as 0.99")
        if self.find_max_rate and self.objective is None:
            raise ConfigError("--find-max-rate without --slo", fix="say which latency is fast enough: --slo ttft=500")

    @property
    def loads(self) -> list[tuple[str, float]]:
        """Kind and value of every point. The search for a rate starts from the point where all arrive at once."""
        rates = self.rates + ((math.inf,) if self.find_max_rate and math.inf not in self.rates else ())
        return [*(("rate", rate) for rate in rates), *(("concurrency", float(n)) for n in self.concurrency)]

    @property
    def num_sequences(self) -> int:
        """How many requests the server has to run at once; more wait in it."""
        return max(self.num_at_a_rate if self.rates else 1, *self.concurrency, 1)

    def load(self, kind: str, value: float, repeat: int) -> Load:
        """What vLLM's benchmark is to send. Repeats differ in prompts and arrivals, points of one repeat do not."""
        from serve.client import Load

        limit = int(value) if kind == "concurrency" else self.max_in_flight
        rate = value if kind == "rate" else math.inf
        warmups = int(value) if kind == "concurrency" else self.num_at_a_rate
        return Load(self.requests, self.input_tokens, self.output_tokens, rate, limit, warmups, self.seed + repeat)

    @property
    def num_at_a_rate(self) -> int:
        """How many requests of a point of given rate can run at once: all of them, up to the server's limit."""
        return min(self.requests, self.max_in_flight or MAX_SEQUENCES, MAX_SEQUENCES)

    def describe(self) -> dict[str, Any]:
        """The part of `settings` in bench.json that was asked for."""
        return {
            "rates": [shown(rate) for rate in self.rates],
            "concurrency": list(self.concurrency),
            "requests": self.requests,
            "repeats": self.repeats,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "seed": self.seed,
            "max_in_flight": self.max_in_flight,
            "slo": dataclasses.asdict(self.objective) if self.objective else None,
            "slo_share": self.slo_share,
            "find_max_rate": self.find_max_rate,
            "warmup": WARMUP,
            "arrivals": "Poisson, scaled so that the last request is sent at requests/rate",
            "ignore_eos": True,
            "temperature": 1.0,
        }


# What a point depends on besides its own kind, value and repeat.
IDENTITY = (
    "requests",
    "input_tokens",
    "output_tokens",
    "seed",
    "max_in_flight",
    "engine",
    "model_sha256",
    "device",
    "vllm",
    "warmup",
)


def shown(value: float) -> float | str:
    """JSON has no infinity; whole numbers without a fraction."""
    return "inf" if math.isinf(value) else int(value) if float(value).is_integer() else value


def parse_rates(text: str) -> tuple[float, ...]:
    """`0.5,1,inf` as numbers; ConfigError unless all are positive and different. An empty text: none."""
    fix = "give different positive numbers of requests per second, or inf, such as 0.5,2,inf"
    try:
        rates = tuple(float(part) for part in text.split(",")) if text.strip() else ()
    except ValueError:
        raise ConfigError(f"--rates {text}", fix=fix) from None
    if len(set(rates)) < len(rates) or any(not rate > 0 for rate in rates):
        raise ConfigError(f"--rates {text}", fix=fix)
    return rates


def parse_concurrency(text: str) -> tuple[int, ...]:
    """`1,4,16` as numbers; ConfigError unless all are positive and different. An empty text: none."""
    fix = "give different positive numbers of requests, such as 1,4,16"
    try:
        limits = tuple(int(part) for part in text.split(",")) if text.strip() else ()
    except ValueError:
        raise ConfigError(f"--concurrency {text}", fix=fix) from None
    if len(set(limits)) < len(limits) or any(limit < 1 for limit in limits):
        raise ConfigError(f"--concurrency {text}", fix=fix)
    return limits


def unmeasured(kind: str, value: float, repeat: int) -> dict[str, Any]:
    """A point that has not been run."""
    point: dict[str, Any] = {"kind": kind, "value": shown(value), "repeat": repeat, "status": "not run"}
    keys = ("duration_s", "completed", "failed", *RATES, *LATENCIES, "samples", "error")
    return {**point, **dict.fromkeys(keys)}


def measured(point: Mapping[str, Any], result: Result, workload: OnlineWorkload) -> dict[str, Any]:
    """The point with what vLLM's benchmark returned. No time between tokens where a request has one token."""
    statistics: dict[str, Any] = dict(result.statistics)
    if workload.output_tokens < 2:
        statistics |= {"tpot_ms": None, "itl_ms": None}
    found = {
        **point,
        "status": "failed" if result.failed or not result.completed else "done",
        "duration_s": result.duration,
        "completed": result.completed,
        "failed": result.failed,
        "requests_per_s": result.request_throughput,
        "output_tokens_per_s": result.output_throughput,
        **(statistics if result.completed else {}),
        "samples": result.samples(),
    }
    if result.failed:
        found["error"] = next((error for error in found["samples"]["error"] if error), "no reason given")
    if result.completed and has_queue(point):
        raw = found["samples"]
        rows = zip(raw["e2e_s"], raw["queue_s"], raw["error"], strict=True)
        waited = [e2e + queue for e2e, queue, error in rows if not error]
        found["e2e_with_queue_ms"] = samples.latency_summary({"e2e_s": waited}, PERCENTILES)["e2e_ms"]
    return with_goodput(found, workload.objective)


def has_queue(point: Mapping[str, Any]) -> bool:
    """Whether waiting in the client means something: only where requests arrive at a finite rate.

    With a concurrency limit alone all requests are there at once, and how long the last one waits only says how many
    were sent.
    """
    return point["kind"] == "rate" and point["value"] != "inf"


def with_goodput(point: Mapping[str, Any], objective: slo.Objective | None) -> dict[str, Any]:
    """The point with the requests per second that met the objective."""
    if objective is None or point["status"] != "done":
        return {**point, "goodput_rps": None}
    return {**point, "goodput_rps": slo.num_met(objective, point["samples"], has_queue(point)) / point["duration_s"]}


def curve(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each kind and value with a finished point: means over the repeats with 95% intervals (Student's t)."""
    groups: dict[tuple[str, Any], list[Mapping[str, Any]]] = {}
    for point in points:
        if point["status"] == "done":
            groups.setdefault((point["kind"], point["value"]), []).append(point)
    found = []
    for (kind, value), group in groups.items():
        entry: dict[str, Any] = {"kind": kind, "value": value, "repeats": len(group)}
        for name in RATES:
            known = [p[name] for p in group if p[name] is not None]
            entry[name] = samples.mean_interval(known) if known else None
        for name in LATENCIES:
            rows = [p[name] for p in group if p[name] is not None]
            entry[name] = {k: samples.mean_interval([r[k] for r in rows]) for k in rows[0]} if rows else None
        found.append(entry)
    return found


class Sweep:
    """All points of a sweep, those of an earlier attempt among them; `run` measures what is missing.

    identity: what the points depend on besides the workload (model, engine, device). earlier: the `online` part of a
    bench.json; its finished points are kept if they were measured alike.
    """

    def __init__(
        self, workload: OnlineWorkload, identity: Mapping[str, Any], earlier: Mapping[str, Any] | None = None
    ) -> None:
        self.workload = workload
        self.settings = {**workload.describe(), **identity}
        self.max_rate: dict[str, Any] | None = None
        kept = {}
        if earlier and all(earlier["settings"].get(key) == self.settings.get(key) for key in IDENTITY):
            done = [p for p in earlier["points"] if p["status"] == "done"]
            kept = {(p["kind"], p["value"], p["repeat"]): with_goodput(p, workload.objective) for p in done}
            if all(earlier["settings"].get(k) == self.settings[k] for k in ("slo", "slo_share", "repeats")):
                self.max_rate = earlier.get("max_rate_under_slo")
        self.points = [
            kept.get((kind, shown(value), repeat)) or unmeasured(kind, value, repeat)
            for repeat in range(workload.repeats)
            for kind, value in workload.loads
        ]
        self.num_kept = sum(point["status"] == "done" for point in self.points)

    @property
    def complete(self) -> bool:
        """Whether nothing is left to measure."""
        search = self.workload.find_max_rate and self.max_rate is None
        return not search and all(point["status"] == "done" for point in self.points)

    def describe(self) -> dict[str, Any]:
        """The `online` part of bench.json."""
        maximum = self.max_rate if self.workload.find_max_rate else None
        return {
            "settings": self.settings, "points": self.points, "curve": curve(self.points), "max_rate_under_slo": maximum
        }  # fmt: skip

    def run(
        self,
        measure: Callable[[Load], Result],
        alive: Callable[[], bool],
        save: Callable[[], None],
        progress: Callable[[str], None],
    ) -> None:
        """Measure what is missing with `measure`; `save` after each point. ServerDied if the server is no longer `alive`."""
        for index, point in enumerate(self.points):
            if point["status"] == "done":
                continue
            kind, value, repeat = point["kind"], float(point["value"]), point["repeat"]
            progress(f"{label(point)}, repeat {repeat + 1}/{self.workload.repeats}")
            result = measure(self.workload.load(kind, value, repeat))
            self.points[index] = measured(unmeasured(kind, value, repeat), result, self.workload)
            died = bool(result.failed) and not alive()
            if died:
                self.points[index]["status"] = "failed"
            save()
            if died:
                raise ServerDied(f"in the middle of {label(point)}, repeat {repeat + 1}")
        if self.workload.find_max_rate and self.max_rate is None:
            self._search(measure, alive, progress)
            save()

    def _search(
        self, measure: Callable[[Load], Result], alive: Callable[[], bool], progress: Callable[[str], None]
    ) -> None:
        """Bisect below the throughput of the point where all requests arrive at once."""
        objective = self.workload.objective
        assert objective is not None

        failed = 0

        def probe(rate: float) -> list[tuple[int, int]]:
            nonlocal failed
            outcomes = []
            for repeat in range(self.workload.repeats):
                progress(f"highest rate: {rate:.3g} req/s, repeat {repeat + 1}/{self.workload.repeats}")
                # Other arrivals than the points of the sweep have.
                result = measure(self.workload.load("rate", rate, self.workload.repeats + repeat))
                if result.failed and not alive():
                    raise ServerDied(f"in the search for the highest rate, at {rate:.3g} req/s")
                failed += result.failed
                met = slo.num_met(objective, result.samples(), with_queue=True)
                outcomes.append((met, self.workload.requests))
            return outcomes

        rates = [
            p["requests_per_s"] for p in self.points if (p["kind"], p["value"], p["status"]) == ("rate", "inf", "done")
        ]
        if not rates:
            return
        ceiling = sum(rates) / len(rates)
        found = slo.find_max_rate(probe, ceiling, self.workload.slo_share)
        self.max_rate = {
            "slo": self.settings["slo"], "slo_share": self.workload.slo_share, "ceiling_rps": ceiling, **found,
            "failed_requests": failed,
        }  # fmt: skip


def label(point: Mapping[str, Any]) -> str:
    """A point's load in words."""
    if point["kind"] == "concurrency":
        return f"{point['value']:g} at a time"
    return "all at once" if point["value"] == "inf" else f"{point['value']:g} req/s"


def failure(online: Mapping[str, Any]) -> str | None:
    """What went wrong in a sweep whose server is still there, in words; None if no request failed."""
    failed = [point for point in online["points"] if point["status"] == "failed"]
    found = [
        f"{label(point)}, repeat {point['repeat'] + 1}: {point['failed']} of {online['settings']['requests']} requests"
        for point in failed[:3]
    ]
    if len(failed) > 3:
        found.append(f"{len(failed) - 3} more points")
    searched = (online.get("max_rate_under_slo") or {}).get("failed_requests")
    if searched:
        found.append(f"the search for the highest rate: {searched} requests")
    if not found:
        return None
    reason = f" ({failed[0]['error']})" if failed else ""
    return f"requests failed: {'; '.join(found)}{reason}"


def alive(server: Private) -> bool:
    """Whether the server answers; asked after a failed request, so it gets a moment to end, or to recover."""
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            return False
        if server.healthy():
            return True
        time.sleep(0.2)
    return False


def measure(
    source: Any, config: Any, sweep: Sweep, log: Path, save: Callable[[], None], progress: Callable[[str], None]
) -> None:
    """Start the server, run what the sweep misses, stop it. Needs `engine.importable_vllm` around it.

    ServerDied, with the reason from the server's log, if it ends in the middle; UserError if it does not come up.
    """
    from serve import client, server
    from serve.engine import logged_reason, signals_as_exceptions

    progress("starting vLLM's server (about half a minute)")
    with signals_as_exceptions(), server.private(config, source.name, log) as started:
        try:
            sweep.run(
                lambda load: client.run(started.url, source.name, source.location, load),
                lambda: alive(started), save, progress,
            )  # fmt: skip
        except ServerDied as died:
            reason = logged_reason(log) or _exit(started.process)
            raise ServerDied(f"vLLM's server died {died}: {reason}; its whole log is in {log}") from None


def _exit(process: Popen[bytes]) -> str:
    code = process.poll()
    if code is None:
        return "it no longer answers and logged no error"
    return f"it was killed by signal {-code}" if code < 0 else f"it logged no error and ended with code {code}"
