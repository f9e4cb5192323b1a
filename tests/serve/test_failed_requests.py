"""Requests that fail: they are shown, their loads are compared with nothing, the gate and the exit code say it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from test_compare_benches import bench, write

from serve import compare, compare_output, online
from serve.client import METRICS, Result
from serve.compare_cli import compare_benches
from serve.online import OnlineWorkload, measured, unmeasured
from tinyllama.errors import UserError

LOAD = "4 at a time, 24x16, 10 requests"


def failing(content: dict[str, Any], lost: int, status: str = "done") -> dict[str, Any]:
    """In one repeat of one load so many requests failed; `done` as benches say it that are older than this rule."""
    point = next(p for p in content["online"]["points"] if p["kind"] == "concurrency")
    point |= {"failed": lost, "completed": 10 - lost, "status": status}
    return content


@pytest.mark.parametrize(("lost", "status"), [(5, "done"), (1, "failed"), (10, "failed")])
@pytest.mark.parametrize("first", [True, False])
def test_a_load_with_failed_requests_is_not_compared(tmp_path: Path, lost: int, status: str, first: bool):
    healthy, sick = bench(seed=1), failing(bench(0.5, seed=2), lost, status)
    benches = {"sick": sick, "healthy": healthy} if first else {"healthy": healthy, "sick": sick}
    names = [str(write(tmp_path / name, content)) for name, content in benches.items()]
    report = compare.compare(names)
    assert not any(c.configuration == LOAD for c in report.comparisons)
    assert any("all at once" in c.configuration for c in report.comparisons)
    text = " ".join(compare_output.tables(report)[0].notes)
    assert f"Requests failed in sick: {LOAD}: {lost} of 10 requests failed" in text
    assert "Nothing else that is recorded differs" not in text
    assert f"Only in healthy: {LOAD}" not in text
    assert f'sick,"{LOAD}",,,,,,,,,,,{lost} of 10 requests failed' in compare_output.as_csv(report)
    assert json.loads(compare_output.text(report, "json"))["benches"][0 if first else 1]["failures"]
    assert compare_benches(names, None).failure is None
    assert str(compare_benches(names, ["90"]).failure).startswith(f"requests failed: sick, {LOAD}: {lost} of 10")


def test_a_gate_of_nothing_but_failures_fails(tmp_path: Path):
    benches = [bench(seed=1), bench(seed=2)]
    for content in benches:
        content["throughput"] = []
        for point in content["online"]["points"]:
            point |= {"failed": 0, "completed": 10}
    for point in benches[1]["online"]["points"]:
        if (point["kind"], point["value"]) != ("rate", 2):
            point |= {"failed": 10, "completed": 0, "status": "failed"}
    names = [str(write(tmp_path / str(number), content)) for number, content in enumerate(benches)]
    assert "requests failed: 1, all at once" in str(compare_benches(names, ["5"]).failure)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda b: b["throughput"][0]["samples_s"].append(math.nan), "NaN is not a number in JSON"),
        (lambda b: b["throughput"][0]["samples_s"].append(None), "incomplete"),
        (lambda b: b["throughput"][0]["samples_s"].append(0), "incomplete"),
        (lambda b: b["throughput"][0]["samples_s"].append("1"), "incomplete"),
        (lambda b: b["latency"]["samples"]["e2e_s"].append(math.inf), "Infinity is not a number in JSON"),
        (lambda b: b["online"]["points"][0]["ttft_ms"].update(mean=math.nan), "NaN is not a number in JSON"),
        (lambda b: b["online"]["points"][0]["ttft_ms"].update(mean=-1.0), "incomplete"),
        (lambda b: b["online"].update(points=None), "incomplete"),
        (lambda b: b.update(online=[]) or b.update(throughput=[], latency={"samples": {}}), "no finished measurement"),
        (lambda b: b.update(device=None), "incomplete"),
        (lambda b: b["throughput"][0].update(samples_s=[]), "a batch without samples"),
        (lambda b: b["throughput"].append(b["throughput"][0]), "stands there twice"),
        (lambda b: b["throughput"][0].update(batch_size=0), "0 is no count"),
        (lambda b: b["online"]["points"].append(b["online"]["points"][0]), "stands there twice"),
        (lambda b: b["online"]["points"][0].update(status="Done"), "status 'Done'"),
        (lambda b: b["online"]["points"][0].update(failed=-1), "-1 is no count"),
        (lambda b: b["online"].update(points={}), "no list"),
    ],
)
def test_numbers_that_are_none(tmp_path: Path, edit: Any, words: str):
    content = bench()
    edit(content)
    with pytest.raises(UserError, match=words):
        compare.compare([str(write(tmp_path / "a", content))])


def test_a_load_that_was_interrupted_is_said_and_fails_the_gate(tmp_path: Path):
    names = [str(write(tmp_path / "whole", bench(seed=1)))]
    for least, name in ((4, "part"), (0, "none")):
        content = bench(seed=2)
        for point in content["online"]["points"]:
            if point["kind"] == "concurrency" and point["repeat"] >= least:
                point |= {key: None for key in point if key not in ("kind", "value", "repeat")} | {"status": "not run"}
        names.append(str(write(tmp_path / name, content)))
    report = compare.compare(names)
    assert {c.bench for c in report.comparisons if c.configuration == LOAD} == {"part"}
    for sheet, name, count in zip(compare_output.tables(report), ("part", "none"), (2, 6), strict=True):
        text = " ".join(sheet.notes)
        assert f"Not finished in {name}: {LOAD}: {count} of 6 repeats were not run." in text
        assert "Nothing else that is recorded differs" not in text
        assert "Only in" not in text
    assert compare_benches(names, None).failure is None
    assert str(compare_benches(names[:2], ["90"]).failure) == f"not finished: part, {LOAD}: 2 of 6 repeats were not run"


def test_failures_of_the_search_for_a_rate_are_failures(tmp_path: Path):
    content = bench(seed=2)
    content["online"]["max_rate_under_slo"] = {"failed_requests": 7}
    names = [str(write(tmp_path / "a", bench())), str(write(tmp_path / "b", content))]
    assert str(compare_benches(names, ["90"]).failure).endswith("b, the search for the highest rate: 7 requests failed")


def test_a_bench_that_was_cut_off(tmp_path: Path):
    folder = write(tmp_path / "a", bench(online=False))
    text = (folder / "bench.json").read_text()
    for cut in (0, 1, len(text) // 2, len(text) - 1):
        (folder / "bench.json").write_text(text[:cut])
        with pytest.raises(UserError, match="is not JSON"):
            compare.compare([str(folder)])


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda b: b["settings"].update(seed=7), "seed"),
        (lambda b: b["settings"].update(prompts_sha256="0" * 64), "prompts_sha256"),
        (lambda b: b["device"].update(driver="590"), "device driver"),
        (lambda b: b["versions"].update(python="3.12"), "version of python"),
        (lambda b: b["online"]["settings"].update(seed=9), "online seed"),
        (lambda b: b["online"]["settings"].update(warmup=None), "online warmup"),
        (lambda b: b["model"].update(step=5), "step"),
    ],
)
def test_whatever_is_recorded_and_differs_is_said(tmp_path: Path, edit: Any, words: str):
    other = bench(seed=2)
    edit(other)
    report = compare.compare([str(write(tmp_path / "a", bench())), str(write(tmp_path / "b", other))])
    assert any(line.startswith(f"{words}: ") for line in report.differing(report.benches[1]))


def result(failed: int, requests: int = 4) -> Result:
    """What vLLM's benchmark returns."""
    done = requests - failed
    row = {"mean": 1.0, "p50": 1.0, "p90": 1.0, "p95": 1.0, "p99": 1.0}
    return Result(
        duration=1.0, completed=done, failed=failed, request_throughput=float(done), output_throughput=64.0 * done,
        input_lens=[64] * requests, output_lens=[64] * done + [0] * failed, ttfts=[0.1] * requests,
        itls=[[]] * requests, latencies=[1.0] * requests, start_times=[0.0] * requests, queue_times=[0.0] * requests,
        errors=[""] * done + ["boom"] * failed, statistics=dict.fromkeys(METRICS, row),
    )  # fmt: skip


@pytest.mark.parametrize("failed", [1, 4])
def test_a_point_with_a_failed_request_has_failed(failed: int):
    work = OnlineWorkload((math.inf,), (4,), requests=4, repeats=1)
    point = measured(unmeasured("concurrency", 4, 0), result(failed), work)
    assert (point["status"], point["failed"], point["error"]) == ("failed", failed, "boom")
    assert online.curve([point]) == []
    sweep = {"points": [point], "settings": work.describe()}
    assert online.failure(sweep) == f"requests failed: 4 at a time, repeat 1: {failed} of 4 requests (boom)"
    fine = measured(unmeasured("concurrency", 4, 0), result(0), work)
    assert online.failure({"points": [fine], "settings": work.describe()}) is None


def test_as_many_requests_warm_up_as_run_at_once():
    work = OnlineWorkload((2.0, math.inf), (1, 32, 300), requests=100, repeats=1)
    assert [work.load(*load, 0).warmups for load in work.loads] == [100, 100, 1, 32, 300]
    held_back = OnlineWorkload((math.inf,), (), requests=100, repeats=1, max_in_flight=20)
    assert [held_back.load(*load, 0).warmups for load in held_back.loads] == [20]
    many = OnlineWorkload((math.inf,), (), requests=1000, repeats=1)
    assert many.load("rate", math.inf, 0).warmups == many.num_sequences == 256
