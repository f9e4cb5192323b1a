"""A real sweep on vLLM's server: interrupted, its server killed, resumed; and what the numbers must then be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from rich.console import Console
from tiny_llama import build

from serve import samples
from serve.online_table import online_sheets
from serve.table import load_bench, markdown, print_bench

REQUESTS, OUTPUT = 9, 12
# The second point's rate is low where a sweep is stopped in it: it lasts three minutes, or fifteen seconds.
RATE, RATE_TO_INTERRUPT, RATE_TO_KILL = 1.5, 0.05, 0.6
SWEEP = [
    "--measure", "online", "--concurrency", "2", "--requests", str(REQUESTS),
    "--online-repeats", "2", "--input-tokens", "20", "--output-tokens", str(OUTPUT), "--eager", "--seed", "3",
]  # fmt: skip


class Attempt:
    """A `tinyllama serve` that is running, or has ended."""

    def __init__(self, model: Path, output: Path, *more: str, rate: float = RATE) -> None:
        self.output, self.rate = output, rate
        self.errors = output.parent / "stderr"
        command = [sys.executable, "-m", "tinyllama", "serve", str(model), "--output", str(output), *SWEEP, *more]
        command += ["--rates", f"40,{rate},inf"]
        environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200", "HTTP_PROXY": "http://127.0.0.1:1"}
        environment["PYTHONUNBUFFERED"] = "1"  # what vLLM's client says is in the log at once
        environment["VLLM_API_KEY"] = "a key that the server must not ask for"
        with open(self.errors, "w") as errors:
            self.process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=errors, env=environment, cwd=ROOT
            )

    def wait_until(self, what: Any) -> None:
        """Until `what()` is true; fails if the process ends before."""
        deadline = time.monotonic() + 240
        while not what():
            assert self.process.poll() is None, self.errors.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def statuses(self) -> list[str]:
        file = self.output / "bench.json"
        return [p["status"] for p in json.loads(file.read_text())["online"]["points"]] if file.exists() else []

    def is_in_second_point(self) -> bool:
        return f"Traffic request rate: {self.rate}" in (self.output / "vllm.log").read_text()

    def server_is_up(self) -> bool:
        log = self.output / "server.log"
        return log.exists() and "Application startup complete" in log.read_text()

    def ended(self) -> tuple[int, str]:
        """Exit code, and what it said last."""
        code = self.process.wait(240)
        return code, self.errors.read_text().strip().splitlines()[-1]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("online") / "tiny"


@pytest.fixture(scope="module")
def interrupted(llama: Path, output: Path) -> tuple[int, str, dict[str, Any], list[Any]]:
    """Exit code, last words, bench.json and the processes left of a sweep that got Ctrl-C in its second point."""
    import psutil

    attempt = Attempt(llama, output, rate=RATE_TO_INTERRUPT)
    attempt.wait_until(lambda: "done" in attempt.statuses() and attempt.is_in_second_point())
    family = psutil.Process(attempt.process.pid).children(recursive=True)
    attempt.process.send_signal(signal.SIGINT)
    code, said = attempt.ended()
    return code, said, load_bench(output), [p for p in family if p.is_running()]


@pytest.fixture(scope="module")
def killed(interrupted, llama: Path, output: Path) -> tuple[int, str, dict[str, Any]]:
    """The same command again; this time its server loses its engine."""
    import psutil

    (output / "server.log").unlink()
    attempt = Attempt(llama, output, rate=RATE_TO_KILL)
    attempt.wait_until(attempt.server_is_up)
    attempt.wait_until(attempt.is_in_second_point)
    family = psutil.Process(attempt.process.pid).children(recursive=True)
    next(p for p in family if "EngineCore" in " ".join(p.cmdline()) or "EngineCore" in p.name()).kill()
    return *attempt.ended(), load_bench(output)


@pytest.fixture(scope="module")
def finished(killed, llama: Path, output: Path) -> tuple[int, str, dict[str, Any]]:
    """And again, now with an objective and the search for the highest rate."""
    attempt = Attempt(llama, output, "--slo", "ttft=2000,tpot=500", "--find-max-rate", "--slo-share", "0.9")
    return *attempt.ended(), load_bench(output)


def states(bench: dict[str, Any]) -> list[tuple[str, Any, str]]:
    return [(p["kind"], p["value"], p["status"]) for p in bench["online"]["points"]]


def test_an_interrupt_keeps_the_finished_point_and_ends_the_server(interrupted):
    code, said, bench, left = interrupted
    assert code == 130
    assert "what was finished is kept" in said
    assert states(bench)[:4] == [
        ("rate", 40.0, "done"), ("rate", RATE_TO_INTERRUPT, "not run"), ("rate", "inf", "not run"),
        ("concurrency", 2.0, "not run"),
    ]  # fmt: skip
    assert not left
    assert bench["throughput"] == []


def test_a_server_that_dies_is_one_line_and_the_finished_points_stay(killed, interrupted):
    code, said, bench = killed
    assert code == 1
    assert said.startswith("error: vLLM's server died in the middle of 0.6 req/s")
    assert "EngineDeadError" in said
    assert "server.log" in said
    assert states(bench)[1:3] == [("rate", RATE_TO_KILL, "failed"), ("rate", "inf", "not run")]
    assert bench["online"]["points"][0] == interrupted[2]["online"]["points"][0]  # kept, not measured again
    assert [entry["value"] for entry in bench["online"]["curve"]] == [40.0]
    assert "not finished" in markdown(bench)


def test_the_same_command_ends_the_sweep(finished, interrupted):
    code, said, bench = finished
    assert code == 0, said
    assert {status for _, _, status in states(bench)} == {"done"}
    assert bench["online"]["points"][0]["samples"] == interrupted[2]["online"]["points"][0]["samples"]
    assert [p["repeat"] for p in bench["online"]["points"]] == [0] * 4 + [1] * 4  # round-robin
    assert [entry["repeats"] for entry in bench["online"]["curve"]] == [2] * 4


def test_every_latency_follows_from_the_raw_samples(finished):
    for point in finished[2]["online"]["points"]:
        raw = point["samples"]
        assert {name: len(values) for name, values in raw.items()} == dict.fromkeys(raw, REQUESTS)
        assert point["completed"] == REQUESTS
        assert point["failed"] == 0
        assert set(raw["output_tokens"]) == {OUTPUT}
        assert all(18 <= count <= 24 for count in raw["input_tokens"])
        tpot = [(e - t) / (OUTPUT - 1) for e, t in zip(raw["e2e_s"], raw["ttft_s"], strict=True)]
        pooled = [gap for row in raw["itl_s"] for gap in row]
        for name, values in (("ttft", raw["ttft_s"]), ("tpot", tpot), ("itl", pooled), ("e2e", raw["e2e_s"])):
            for q in (50, 90, 95, 99):
                expected = 1e3 * samples.percentile(values, q)
                assert point[f"{name}_ms"][f"p{q}"] == pytest.approx(expected, abs=2e-3), (name, q)
        assert point["requests_per_s"] == pytest.approx(REQUESTS / point["duration_s"])
        assert point["output_tokens_per_s"] == pytest.approx(REQUESTS * OUTPUT / point["duration_s"])


def test_a_rate_is_a_rate_and_a_limit_is_a_limit(finished):
    for point in finished[2]["online"]["points"]:
        raw = point["samples"]
        if (
            point["value"] == 1.5
        ):  # the last request is sent at requests/rate after the start, the first at its own delay
            assert max(raw["start_s"]) < REQUESTS / 1.5
            assert point["duration_s"] > REQUESTS / 1.5
        if point["value"] == "inf":
            assert max(raw["start_s"]) < 1
        if point["kind"] == "concurrency":
            spans = [(s, s + e) for s, e in zip(raw["start_s"], raw["e2e_s"], strict=True)]
            edges = sorted([(s, 1) for s, _ in spans] + [(e, -1) for _, e in spans])
            running = [sum(step for _, step in edges[: i + 1]) for i in range(len(edges))]
            assert max(running) <= 2
            assert max(raw["queue_s"]) > min(raw["e2e_s"])  # in the client, and in no latency
            assert point["e2e_with_queue_ms"] is None
        elif point["value"] != "inf":
            assert point["e2e_with_queue_ms"]["p50"] >= point["e2e_ms"]["p50"]


def test_goodput_counts_as_vllm_does(finished):
    """Its own function on the same samples, with an objective that only a part meets."""
    from serve import slo
    from serve.engine import importable_vllm

    point = finished[2]["online"]["points"][-1]
    raw = point["samples"]
    median = point["e2e_ms"]["p50"]
    with importable_vllm():
        from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
        from vllm.benchmarks.serve import calculate_metrics

        rows = zip(raw["ttft_s"], raw["e2e_s"], raw["itl_s"], raw["output_tokens"], raw["start_s"], strict=True)
        outputs = [
            RequestFuncOutput(success=True, ttft=t, latency=e, itl=gaps, output_tokens=n, start_time=s)
            for t, e, gaps, n, s in rows
        ]
        bounds = {"ttft": 1e3 * max(raw["ttft_s"]), "tpot": 500.0, "e2el": median}
        theirs, _ = calculate_metrics([], outputs, point["duration_s"], None, [99], bounds)
    objective = slo.Objective(bounds["ttft"], 500, median)
    ours = slo.num_met(objective, raw, with_queue=False)
    assert 0 < ours < REQUESTS
    assert theirs.request_goodput == pytest.approx(ours / point["duration_s"])


def test_the_highest_rate(finished):
    online = finished[2]["online"]
    found = online["max_rate_under_slo"]
    assert online["settings"]["slo"] == found["slo"] == {"ttft_ms": 2000.0, "tpot_ms": 500.0, "e2e_ms": None}
    assert found["probes"][0]["rate_rps"] == pytest.approx(found["ceiling_rps"])
    assert all(probe["requests"] == 2 * REQUESTS for probe in found["probes"])
    assert found["rate_rps"] == max(p["rate_rps"] for p in found["probes"] if p["meets"])
    assert found["low"] <= found["rate_rps"]
    assert all(0 < entry["goodput_rps"]["mean"] <= entry["requests_per_s"]["mean"] + 1e-9 for entry in online["curve"])


def test_tables_of_the_sweep(finished):
    bench = finished[2]
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    print_bench(bench, console)
    shown = console.export_text()
    for text in ("1.5 req/s", "all at once", "2 at a time", "TTFT", "ITL", "goodput", "Highest rate"):
        assert text in shown
        assert text in markdown(bench)
    assert "one request, ms" not in shown  # nothing was measured offline
    widths = {len(row) for sheet in online_sheets(bench, wide=True) for row in [sheet.headings, *sheet.rows]}
    assert widths
    assert "max_concurrent" not in json.dumps(bench)  # overlaps of whole seconds, not requests in flight
