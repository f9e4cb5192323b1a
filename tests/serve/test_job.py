"""What a second `tinyllama serve` in the same folder keeps, and what it must not."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from serve import online, slo
from serve.bench import Workload
from serve.job import Job, _Run, unfinished
from serve.online import OnlineWorkload, Sweep
from serve.source import Source
from tinyllama.errors import UserError

ENGINE = {"dtype": "bfloat16", "max_num_seqs": 8}
IDENTITY = {"engine": ENGINE, "model_sha256": "a", "device": {"name": "cpu"}, "vllm": "0.32.0"}
WORK = OnlineWorkload((2.0, math.inf), (4,), requests=4, repeats=2)
RAW = {
    "start_s": [0.0] * 4, "queue_s": [0.0] * 4, "ttft_s": [0.1, 0.2, 0.3, 0.4], "e2e_s": [1.0] * 4, "itl_s": [[]] * 4,
    "input_tokens": [64] * 4, "output_tokens": [64] * 4, "error": [""] * 4,
}  # fmt: skip


def half_done() -> dict[str, Any]:
    """The online part after four of six points, as it is read back from a file."""
    sweep = Sweep(WORK, IDENTITY)
    for index in range(4):
        latencies = {key: {"mean": 1.0, "p50": 1.0} for key in online.LATENCIES}
        rates = {"requests_per_s": 2.0, "output_tokens_per_s": 128.0, "duration_s": 2.0}
        sweep.points[index] |= {"status": "done", "samples": RAW, **rates, **latencies, "failed": 0, "completed": 4}
    return json.loads(json.dumps(sweep.describe()))


def test_finished_points_are_kept():
    earlier = half_done()
    again = Sweep(WORK, IDENTITY, earlier)
    assert again.num_kept == 4
    assert again.points[:4] == earlier["points"][:4]
    assert [p["status"] for p in again.points[4:]] == ["not run"] * 2
    assert not again.complete
    assert unfinished({"online": earlier})
    assert not unfinished({})


@pytest.mark.parametrize("online", [{"settings": {}, "points": [{}]}, 5, {"settings": [], "points": []}])
def test_a_damaged_bench_is_one_line_and_stays(tmp_path: Path, online: Any):
    job = Job(Source(str(tmp_path), "m", {}, {}), tmp_path, pytest.fail, Workload())
    run = object.__new__(_Run)
    run.job, run.earlier, run.model_sha256 = job, None, "a"
    settings = {"dtype": "bfloat16", "max_model_len": 8, "eager": True, "draft": None, "model_sha256": "a"}
    run.fresh = {"format": "f", "versions": {}, "device": {}, "settings": settings}
    text = json.dumps({**run.fresh, "throughput": [], "latency": {}, "online": online})
    (tmp_path / "bench.json").write_text(text)
    with pytest.raises(UserError, match=r"bench\.json is incomplete .* move it away"):
        run._earlier()
    assert (tmp_path / "bench.json").read_text() == text


def test_more_loads_and_repeats_keep_what_is_the_same():
    wider = OnlineWorkload((1.0, 2.0, math.inf), (4, 8), requests=4, repeats=3)
    again = Sweep(wider, IDENTITY, half_done())
    assert again.num_kept == 4
    assert len(again.points) == 15
    assert {(p["kind"], p["value"], p["repeat"]) for p in again.points if p["status"] == "done"} == {
        ("rate", 2.0, 0), ("rate", "inf", 0), ("concurrency", 4.0, 0), ("rate", 2.0, 1)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("identity", "work"),
    [
        ({**IDENTITY, "model_sha256": "b"}, WORK),
        ({**IDENTITY, "vllm": "0.33.0"}, WORK),
        ({**IDENTITY, "device": {"name": "gpu"}}, WORK),
        ({**IDENTITY, "engine": {**ENGINE, "dtype": "float32"}}, WORK),
        (IDENTITY, OnlineWorkload((2.0, math.inf), (4,), requests=5, repeats=2)),
        (IDENTITY, OnlineWorkload((2.0, math.inf), (4,), requests=4, repeats=2, seed=1)),
        (IDENTITY, OnlineWorkload((2.0, math.inf), (4,), requests=4, repeats=2, output_tokens=65)),
        (IDENTITY, OnlineWorkload((2.0, math.inf), (4,), requests=4, repeats=2, max_in_flight=3)),
    ],
)
def test_nothing_of_another_model_machine_or_load_is_kept(identity, work):
    assert Sweep(work, identity, half_done()).num_kept == 0


def test_another_objective_counts_the_same_requests_again():
    tight = OnlineWorkload((2.0, math.inf), (4,), 4, 2, objective=slo.Objective(ttft_ms=250))
    again = Sweep(tight, IDENTITY, half_done())
    assert again.num_kept == 4
    assert [p["goodput_rps"] for p in again.points] == [1.0] * 4 + [None] * 2  # two of four in two seconds


def test_a_found_rate_is_kept_only_for_its_objective():
    found = {"slo": {"ttft_ms": 250, "tpot_ms": None, "e2e_ms": None}, "rate_rps": 3.0}
    search = OnlineWorkload((2.0, math.inf), (4,), 4, 2, objective=slo.Objective(ttft_ms=250), find_max_rate=True)
    earlier = half_done()
    earlier["settings"] |= {"slo": found["slo"], "slo_share": 0.99}
    earlier["max_rate_under_slo"] = found
    assert Sweep(search, IDENTITY, earlier).max_rate == found
    other = copy.deepcopy(earlier)
    other["settings"]["slo"]["ttft_ms"] = 300
    assert Sweep(search, IDENTITY, other).max_rate is None


def test_the_curve_is_over_repeats_that_are_finished():
    found = half_done()["curve"]
    assert [(e["kind"], e["value"], e["repeats"]) for e in found] == [
        ("rate", 2.0, 2), ("rate", "inf", 1), ("concurrency", 4.0, 1)
    ]  # fmt: skip
    assert found[0]["requests_per_s"] == {"mean": 2.0, "low": 2.0, "high": 2.0}
    assert found[1]["requests_per_s"] == {"mean": 2.0, "low": None, "high": None}
    assert found[0]["ttft_ms"]["p50"]["mean"] == 1.0
    assert found[0]["goodput_rps"] is None


def test_a_model_is_known_by_its_content(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"1")
    source = Source(str(tmp_path), "m", {}, {})
    before = source.content()
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert source.content() != before
    assert Source("org/name", "name", {}, {}).content() == "hub:org/name"
    recorded = Source(str(tmp_path), "m", {}, {"content_sha256": before})  # an export whose weights were replaced since
    assert recorded.content() == source.content()


def test_the_commands_of_the_docs_have_options_that_exist():
    """Every command of docs/serving.md, parsed but not run."""
    import typer

    from tinyllama.cli.app import build

    group = typer.main.get_command(build())
    text = (ROOT / "docs" / "serving.md").read_text()
    lines = [line.split() for line in text.splitlines() if line.startswith("    tinyllama ")]
    assert len(lines) >= 7
    for _, name, *arguments in lines:
        group.commands[name].make_context(name, arguments)


@pytest.mark.parametrize("measured", [{"throughput": [{"batch_size": 1}]}, {"online": half_done()}])
def test_what_was_measured_of_another_model_is_not_lost(tmp_path: Path, measured: dict[str, Any]):
    settings = {"dtype": "bfloat16", "max_model_len": 8, "eager": True, "draft": None, "model_sha256": "a"}
    fresh = {"format": "f", "versions": {}, "device": {}, "settings": settings}
    text = json.dumps({"model": {"path": "exports/a"}, "throughput": [], **fresh, **measured})
    (tmp_path / "bench.json").write_text(text)
    run = object.__new__(_Run)
    run.job = Job(Source(str(tmp_path), "m", {}, {}), tmp_path, pytest.fail, Workload())
    run.model_sha256, run.fresh = "b", {**fresh, "settings": {**settings, "model_sha256": "b"}}
    with pytest.raises(
        UserError, match=r"bench\.json is of another model, exports/a; give another --output, or --overwrite"
    ):
        run._earlier()
    run.job = dataclasses.replace(run.job, overwrite=True)
    assert run._earlier() is None
    (tmp_path / "bench.json").write_text(json.dumps({**json.loads(text), "throughput": [], "online": None}))
    run.job = dataclasses.replace(run.job, overwrite=False)
    assert run._earlier() is None  # nothing was measured
