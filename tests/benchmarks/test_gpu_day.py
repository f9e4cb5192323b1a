"""The GPU day's own machinery: time, rows that survive, parts that fail, hang or print without end. No GPU, no torch."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import ROOT, until
from gpu_day import gpu_tests, pack, plan, rows
from gpu_day.check import check_files, faults
from gpu_day.conduct import KEPT_LOG, LOG_BYTES, ROWS, Day, descendants, table
from gpu_day.plan import Part, Stage
from hypothesis import given, settings
from hypothesis import strategies as st

from train.recipe import load_recipe

# -- Time -----------------------------------------------------------------------------------------------------------------


def test_the_stages_fill_the_day_and_every_part_fits_its_stage():
    assert sum(stage.limit_s for stage in plan.STAGES) == plan.TOTAL_S
    assert [stage.number for stage in plan.STAGES] == list(range(7))
    for stage in plan.STAGES[:-1]:  # the last lives on what the others leave
        assert sum(part.least_s for part in stage.parts) <= stage.limit_s


def test_a_stage_may_use_what_those_before_it_saved_and_none_passes_the_end():
    stages = (Stage(0, "", 30, ()), Stage(1, "", 50, ()), Stage(2, "", 0, ()))
    assert plan.ends(stages, 1000.0, 100.0) == {0: 1030.0, 1: 1080.0, 2: 1092.0}
    assert plan.ends(stages[:2], 0.0, 60.0) == {0: 30.0, 1: 52.0}


@settings(deadline=None)
@given(
    least=st.lists(st.floats(1, 60), min_size=1, max_size=4),
    end=st.floats(0, 500),
    now=st.floats(0, 500),
    index=st.integers(0, 3),
)
def test_what_a_part_is_given_ends_with_its_stage_and_leaves_the_next_its_least(least, end, now, index):
    stage = Stage(1, "", 100, tuple(Part(str(n), "m", seconds) for n, seconds in enumerate(least)))
    index %= len(least)
    seconds, reason = plan.allowance(stage, index, end, now)
    if end - now < least[index]:
        assert seconds is None
        assert f"it needs {least[index]:.0f}" in reason
        return
    assert least[index] <= seconds <= end - now + 1e-9
    if end - now >= sum(least[index:]):
        assert now + seconds + sum(least[index + 1 :]) <= end + 1e-9


def test_where_time_is_not_shared_a_part_may_take_all_of_it():
    parts = (Part("a", "m", 40), Part("b", "m", 35))
    assert plan.allowance(Stage(6, "", 0, parts, shared=False), 0, 100.0, 0.0) == (100.0, "")
    assert plan.allowance(Stage(5, "", 0, parts), 0, 100.0, 0.0) == (65.0, "")
    assert plan.allowance(Stage(5, "", 0, parts), 0, 50.0, 0.0) == (40.0, "")


# -- Rows -----------------------------------------------------------------------------------------------------------------


def test_rows_are_read_back_and_what_is_no_number_is_null(tmp_path):
    mine = rows.Rows(tmp_path / ROWS, 2, "plain")
    mine.measure("good", lambda: ("5 tokens/s", {"tokens_per_s": 5.0, "nothing": float("nan")}))
    assert mine.measure("bad", lambda: 1 / 0) is None
    mine.measure("judged", lambda: ("differs", {"status": rows.FAILED}))
    found = rows.finished(rows.read(tmp_path / ROWS))
    assert [entry["status"] for entry in found] == ["ok", "failed", "failed"]
    assert found[0]["values"] == {"tokens_per_s": 5.0, "nothing": None}
    assert "Traceback" in found[1]["error"]
    assert "ZeroDivisionError" in table(found)


def test_the_table_counts_tests_and_names_those_that_failed(tmp_path):
    mine = rows.Rows(tmp_path / ROWS, 1, "kernel tests")
    for number in range(30):
        mine.add(f"test_gpu_kernels.py::test_{number}", rows.OK)
    mine.add("test_gpu_kernels.py::test_bad", rows.FAILED, error="assert 1 == 2")
    head, failed, counts = table(rows.read(tmp_path / ROWS)).splitlines()
    assert head.startswith("stage")
    assert "test_bad" in failed
    assert counts.endswith("30 ok, 1 failed")


def test_an_error_text_is_kept_whole_up_to_its_limit(tmp_path):
    long = "begin" + "x" * rows.MAX_ERROR + "end"
    entry = rows.Rows(tmp_path / ROWS, 0, "p").add("row", rows.FAILED, error=long)
    assert entry["error"].startswith("begin")
    assert entry["error"].endswith("end")
    assert rows.cut("short") == "short"


def part_module(folder: Path, name: str, body: str) -> None:
    """A module that a stage can run, with `here` to write rows by."""
    head = """\
        import os, signal, subprocess, sys, time
        from pathlib import Path
        from gpu_day.rows import BEGAN, Rows
        here = Rows(Path(os.environ["GPU_DAY_ROWS"]), int(sys.argv[1]), sys.argv[2])
    """
    (folder / f"{name}.py").write_text(textwrap.dedent(head) + textwrap.dedent(body))


@pytest.fixture
def day(tmp_path, monkeypatch) -> Day:
    (tmp_path / "modules").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    made = Day(tmp_path / "out", tmp_path / "work", tiny=True)
    made.work.mkdir()
    return made


def run(day: Day, names: list[str], limit_s: float = 60, total_s: float = 200, least_s: float = 0.5) -> list[dict]:
    """One stage a module; the rows that ended."""
    stages = tuple(Stage(n, name, limit_s, (Part(name, name, least_s),)) for n, name in enumerate(names))
    day.run(stages, total_s)
    return rows.finished(rows.read(day.rows_path))


def test_a_part_that_is_killed_in_the_middle_of_a_row_leaves_the_rows_before_it(day, tmp_path):
    body = """\
        here.measure("first", lambda: ("1", {}))
        here.add("second", BEGAN)
        descriptor = os.open(here.path, os.O_WRONLY | os.O_APPEND)
        os.write(descriptor, b'{"stage": 0, "row": "sec')
        os.kill(os.getpid(), signal.SIGKILL)
    """
    part_module(tmp_path / "modules", "killed", body)
    part_module(tmp_path / "modules", "after", 'here.measure("third", lambda: ("3", {}))')
    found = run(day, ["killed", "after"])
    assert [(e["row"], e["status"]) for e in found] == [("first", "ok"), ("second", "failed"), ("third", "ok")]
    assert "ended by signal 9" in found[1]["error"]


def test_a_part_that_fails_or_hangs_is_recorded_with_its_output_and_the_next_begins(day, tmp_path, capsys):
    part_module(tmp_path / "modules", "broken", 'print("before"); raise RuntimeError("the reason")')
    body = """\
        # A rank in a session of its own, as the launcher starts it.
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        Path(os.environ["GPU_DAY_WORK"], "child").write_text(str(child.pid))
        here.add("slow", BEGAN)
        print("still here", flush=True)
        time.sleep(600)
    """
    part_module(tmp_path / "modules", "hangs", body)
    part_module(tmp_path / "modules", "fine", 'here.measure("last", lambda: ("1", {}))')
    stages = (
        Stage(0, "", 20, (Part("broken", "broken", 0.5), Part("hangs", "hangs", 0.5))),
        Stage(1, "", 20, (Part("fine", "fine", 0.5),)),
    )
    began = time.monotonic()
    day.run_part(stages[0], 0, time.monotonic() + 20)
    to_begin = time.monotonic() - began  # what a part takes to start, on a machine as busy as this one
    day.run_part(stages[0], 1, time.monotonic() + 2 + 10 * to_begin)
    day.run_part(stages[1], 0, time.monotonic() + 20)
    broken, slow, last = rows.finished(rows.read(day.rows_path))
    assert (broken["row"], broken["status"], broken["timed_out"]) == ("broken", "failed", False)
    assert "before" in broken["error"]
    assert "RuntimeError: the reason" in broken["error"]
    assert (slow["row"], slow["status"], slow["timed_out"]) == ("slow", "failed", True)
    assert re.match(r"timed out after \d+ s", slow["error"])
    assert "still here" in slow["error"]
    assert last["status"] == "ok"
    child = int((day.work / "child").read_text())
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().rpartition(")")[2][:3]
    assert "the reason" in (day.out / KEPT_LOG).read_text()
    assert "1 last: ok" in capsys.readouterr().out  # rows are told as they come


def test_what_does_not_fit_the_time_that_is_left_is_skipped_with_the_reason(day, tmp_path):
    part_module(tmp_path / "modules", "first", 'here.measure("first", lambda: ("1", {}))')
    part_module(tmp_path / "modules", "second", 'here.measure("second", lambda: ("2", {}))')
    found = run(day, ["first", "second"], limit_s=1, total_s=plan.TABLE_S + 20, least_s=19)
    assert [(e["row"], e["status"]) for e in found] == [("first", "skipped"), ("second", "ok")]
    assert "it needs 19" in found[0]["reason"]


def test_a_part_that_prints_without_end_fills_no_disk(day, tmp_path):
    body = f"""\
        line = "x" * 99
        for _ in range({LOG_BYTES // 100 + 20_000}):
            print(line)
        print("the end")
    """
    part_module(tmp_path / "modules", "talks", body)
    run(day, ["talks"])
    log = (day.out / KEPT_LOG).read_text()
    assert len(log) < 1.2 * LOG_BYTES
    assert log.rstrip().endswith("the end")
    assert check_files(day.out) == []


def test_a_day_that_is_ended_from_outside_keeps_what_it_has_and_leaves_no_process(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "gpu_day.conduct", "--out", str(out), "--work", str(tmp_path / "work"), "--tiny"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks"), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([*command, "--stage", "0"], env=environment, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "install" in line:  # it has ended, and the next part begins
            break
    assert until(lambda: descendants(process.pid))
    below = descendants(process.pid)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    found = {entry["row"]: entry for entry in rows.finished(rows.read(out / ROWS))}
    assert "install" in found
    assert any(entry.get("error") == "the day was ended by a signal" for entry in found.values())
    assert below
    assert not [pid for pid in below if Path(f"/proc/{pid}").exists()]


def test_a_micro_batch_that_did_not_fit_is_halved():
    import torch
    from gpu_day.training import half_of_what_did_not_fit

    from tinyllama.errors import ConfigError
    from train.memory import explained
    from train.plan import BatchPlan

    for micro, setting in ((16, ["training.micro_batch_sequences=8"]), (1, [])):
        with pytest.raises(ConfigError) as met, explained(BatchPlan(micro, 2, 1, 2048), checkpointing=False):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        assert half_of_what_did_not_fit(f"error: {met.value}") == setting
    assert half_of_what_did_not_fit("error: loss is not finite") == []


def test_an_unknown_stage_is_one_line(tmp_path):
    command = [sys.executable, "-m", "gpu_day.conduct", "--out", "out", "--work", "work", "--stage", "9"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--stage 9; valid: 0, 1, 2, 3, 4, 5, 6" in done.stderr


# -- Pack, verdict ----------------------------------------------------------------------------------------------


def test_more_than_can_be_carried_is_refused_with_the_figure():
    assert pack.check_size(2 * 2**20, 16 * 2**20) == "tree 2.0 + pack 16.0 = 18.0 MiB of 40"
    with pytest.raises(SystemExit, match=r"tree 30\.0 \+ pack 16\.0 = 46\.0 MiB of 40: too much to carry"):
        pack.check_size(30 * 2**20, 16 * 2**20)


def test_the_packed_tokenizer_and_stores_are_those_that_the_recipes_ask_for():
    for name in ("tinyllama_1.1b", "tinyllama_120m"):
        recipe = load_recipe(name, [])
        assert recipe.model.vocab_size == pack.VOCAB_SIZE
        assert {source.store or source.name for source in recipe.data.sources} == set(pack.SOURCES.values())


def test_the_packed_versions_are_those_that_this_project_is_tested_with():
    locked = (ROOT / "requirements" / "cpu.lock").read_text().lower().replace("_", "-").splitlines()
    pinned = {line.split("==")[0]: line.split("==")[1].split()[0] for line in locked if "==" in line}
    for wanted in (*pack.FROM_SOURCE, *pack.PURE, *pack.COMPILED):
        name, version = wanted.split("==")
        assert pinned.get(name, version) == version


def test_the_verdict_names_what_failed_what_was_skipped_and_what_left_no_row(tmp_path):
    path = tmp_path / ROWS
    rows.Rows(path, 0, "install").add("install", rows.OK)
    machine = rows.Rows(path, 0, "machine")
    machine.add("nvidia-smi", rows.SKIPPED, reason="needs a GPU")
    assert faults(rows.read(path), {0}) == []
    machine.add("disk", rows.SKIPPED, reason="no time")
    machine.add("copy", rows.FAILED, error="Traceback\nValueError: no")
    machine.add("matmul", rows.BEGAN)
    found = "\n".join(faults(rows.read(path), {0, 3}))
    for text in ("disk: skipped", "ValueError: no", "matmul began", "default left no row", "deterministic left no row"):
        assert text in found


def test_every_gpu_test_belongs_to_one_part():
    kernels, others = gpu_tests.files_of("kernel tests"), gpu_tests.files_of("other tests")
    assert [path.name for path in kernels] == ["test_gpu_kernels.py"]
    assert sorted(kernels + others) == sorted((ROOT / "tests" / "gpu").glob("test_*.py"))


def test_rows_of_a_day_are_json_lines(tmp_path):
    rows.Rows(tmp_path / ROWS, 0, "p").add("a", rows.OK, values={"path": Path("x"), "tuple": (1, 2)})
    (line,) = (tmp_path / ROWS).read_text().splitlines()
    assert json.loads(line)["values"] == {"path": "x", "tuple": [1, 2]}
