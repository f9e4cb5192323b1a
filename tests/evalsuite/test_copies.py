"""Copies of a model that share the items, and evaluations that are interrupted: the same results in the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import random_llama
from conftest import ROOT, tinyllama
from holding import Hold
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsuite import backends
from evalsuite.cohorts import Prompt
from evalsuite.engines import Copies
from evalsuite.forest import Forest, shares
from evalsuite.scoring import Continuation
from tinyllama import locks

TASKS = "piqa,openbookqa,boolq"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return random_llama.build(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def undisturbed(llama, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    tinyllama(*command(llama, output), env=ONE_THREAD)
    return output


def command(model: Path, output: Path, *more: object, tasks: str = TASKS) -> list[object]:
    return ["eval", "--model", model, "--tasks", tasks, "--data-dir", "mini", "--output", output, *more]


def scores(output: Path) -> dict:
    """results.json without what no two evaluations have in common."""
    found = json.loads((output / "results.json").read_text())
    for entry in found["tasks"].values():
        entry.pop("seconds")
    return found


def logs(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((output / "samples").iterdir())}


# -- Shares ------------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=8), min_size=1, max_size=40),
    st.integers(1, 6),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_shares_hold_every_request_once(sequences, number, generating):
    found = shares(sequences, number, [5] * len(sequences) if generating else None)
    assert len(found) == number
    assert sorted(index for part in found for index in part) == list(range(len(sequences)))


def test_shares_are_equal_and_cut_where_little_is_common():
    # Ten subjects of ten questions, each behind a header of its own of 50 tokens.
    sequences = [[subject] * 50 + [100 + question] * 5 for subject in range(10) for question in range(10)]
    for number in (2, 5):
        parts = shares(sequences, number)
        assert {len(part) for part in parts} == {100 // number}
        # No header is computed in two shares.
        assert sum(Forest([sequences[i] for i in part]).size for part in parts) == Forest(sequences).size


# -- Copies ------------------------------------------------------------------------------------------------------------


def test_two_copies_give_the_scores_of_one(llama, undisturbed, tmp_path):
    tinyllama(*command(llama, tmp_path, "--data-parallel", 2), env=ONE_THREAD)
    one, two = scores(undisturbed), scores(tmp_path)
    assert (one["settings"].pop("copies"), two["settings"].pop("copies")) == (1, 2)
    assert one == two
    for name in logs(undisturbed):
        pairs = zip(*(map(json.loads, (o / "samples" / name).open()) for o in (undisturbed, tmp_path)), strict=True)
        for before, after in pairs:
            assert before["doc_hash"] == after["doc_hash"]
            for (a, a_greedy), (b, b_greedy) in zip(before["filtered_resps"], after["filtered_resps"], strict=True):
                assert float(a) == pytest.approx(float(b), rel=1e-5)
                assert a_greedy == b_greedy


def test_copies_answer_in_order_and_a_dead_one_is_told(llama):
    choice = backends.choose(str(llama), "native", "float32", None, None, 2)
    copies = Copies(choice, 2)
    parts = []
    copies.on_progress = parts.append
    try:
        wanted = [Continuation([1, 5 + n % 7, 9 + n], [20 + n]) for n in range(12)]
        found = copies.score(wanted)
        assert [copies.score([w])[0] for w in wanted] == [
            (pytest.approx(score, rel=1e-5), greedy) for score, greedy in found
        ]
        assert len({round(score, 6) for score, _ in found}) == 12
        made = copies.extend([Prompt([1, 5 + n], 3 + n, ()) for n in range(4)])
        assert [len(tokens) for tokens in made] == [3, 4, 5, 6]
        assert copies.work.generated >= 14
        assert parts
        assert all(0 <= part <= 1 for part in parts)
        copies._processes[1].kill()
        with pytest.raises(RuntimeError, match=r"copy 2 of 2 .* died \(signal 9\)"):
            copies.score(wanted)
    finally:
        copies.close()
    assert not any(process.is_alive() for process in copies._processes)


def test_copies_are_the_native_backends(llama, tmp_path):
    for arguments, words in ((("--data-parallel", 0), "--data-parallel 0"), (
        ("--data-parallel", 2, "--backend", "hf"), "--data-parallel 2 with --backend hf")):  # fmt: skip
        done = tinyllama(*command(llama, tmp_path, *arguments), check=False)
        assert done.returncode == 2
        assert words in done.stderr


# -- Interruptions -----------------------------------------------------------------------------------------------------


def stopped_after(number: int, how: signal.Signals, llama: Path, output: Path) -> tuple[int, str]:
    """Exit code and errors of an evaluation that gets a signal when `number` benchmarks are in results.json.

    It is held as it gives the file its name once more.
    """
    hold = Hold(output, f"command|os.rename|{output / 'results' / 'results.json'}", number + 1)
    arguments = [sys.executable, "-m", "tinyllama", *map(str, command(llama, output / "results"))]
    process = subprocess.Popen(
        arguments,
        cwd=ROOT,
        env={**os.environ, **ONE_THREAD, **hold.environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    hold.wait(process)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_evaluation_ends_with_the_same_results(llama, undisturbed, tmp_path, monkeypatch, how):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code, said = stopped_after(1, how, llama, tmp_path)
    output = tmp_path / "results"
    partial = json.loads((output / "results.json").read_text())
    assert len(partial["tasks"]) == 1
    assert code == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[how]
    if how != signal.SIGKILL:
        assert "interrupted; what was finished is kept" in said
        assert "Traceback" not in said
        assert not list(tmp_path.glob("tinyllama-*"))
        assert not (output / ".lock").exists()
    first = next(iter(partial["tasks"]))
    done = tinyllama(*command(llama, output), env=ONE_THREAD)
    assert f"{first}: {partial['tasks'][first]['seconds']:.1f} s (kept from before)" in done.stderr
    assert scores(output) == scores(undisturbed)
    assert logs(output) == logs(undisturbed)
    assert not list(tmp_path.glob("tinyllama-*"))  # not even those of the one that was killed


def test_a_second_evaluation_into_a_folder_is_refused(llama, undisturbed):
    with locks.held(locks.inside(undisturbed), undisturbed, "tinyllama eval"):
        before = (undisturbed / "results.json").read_bytes()
        done = tinyllama(*command(llama, undisturbed), check=False)
        assert done.returncode == 2
        assert f"{undisturbed} is in use by tinyllama eval (pid {os.getpid()} " in done.stderr
        assert (undisturbed / "results.json").read_bytes() == before


def test_other_benchmarks_join_what_is_there_and_other_settings_do_not(llama, undisturbed, tmp_path):
    tinyllama(*command(llama, tmp_path, tasks="boolq"), env=ONE_THREAD)
    done = tinyllama(*command(llama, tmp_path, tasks="piqa,openbookqa"), env=ONE_THREAD)
    assert "kept" not in done.stderr
    assert scores(tmp_path)["tasks"] == scores(undisturbed)["tasks"]
    tinyllama(*command(llama, tmp_path, "--no-resume", tasks="piqa"), env=ONE_THREAD)
    assert list(scores(tmp_path)["tasks"]) == ["piqa"]
    before = (tmp_path / "results.json").read_bytes()
    done = tinyllama(*command(llama, tmp_path, "--limit", 2, tasks="boolq"), env=ONE_THREAD, check=False)
    assert done.returncode == 2
    assert "has scores (piqa) of limit None, not 2; give another --output, or --overwrite" in done.stderr
    assert (tmp_path / "results.json").read_bytes() == before
    tinyllama(*command(llama, tmp_path, "--limit", 2, "--overwrite", tasks="boolq"), env=ONE_THREAD)
    assert list(scores(tmp_path)["tasks"]) == ["boolq"]
