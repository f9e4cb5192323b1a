"""What a run tells while it trains: DeepSpeed's monitors under our names, and lm-eval scores of the live model."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from conftest import ROOT, tinyllama, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_pretrain import losses, metrics

from tinyllama import checkpoint
from tinyllama.errors import ConfigError
from train.metrics import take_monitors

EVALUATION = ("evaluation.tasks=arc_easy,piqa", "evaluation.limit=9", "evaluation.data_dir=mini")


@pytest.fixture(scope="module")
def watched_run(stores, tmp_path_factory) -> Path:
    """`finished_run` with scores after steps 5 and 9, TensorBoard and CSV files."""
    folder = tmp_path_factory.mktemp("watched")
    config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    config.update(tensorboard={"enabled": True}, csv_monitor={"enabled": True})
    (folder / "ds.json").write_text(json.dumps(config))
    extra = ("--deepspeed", str(folder / "ds.json"), "--eval-every", "5")
    train(stores, folder / "run", "training.tokens=6912", *EVALUATION, extra=extra)
    return folder / "run"


def test_scores_of_the_live_model_are_those_of_its_checkpoint_and_change_nothing(watched_run, finished_run, tmp_path):
    assert losses(watched_run) == losses(finished_run)
    scored = {entry["step"]: entry["evaluation"] for entry in metrics(watched_run) if "evaluation" in entry}
    assert list(scored) == [5, 9]
    arguments = ["--tasks", "arc_easy,piqa", "--limit", 9, "--data-dir", "mini", "--dtype", "bfloat16"]
    tinyllama("eval", "--model", checkpoint.resolve(watched_run), *arguments, "--output", tmp_path)
    expected = json.loads((tmp_path / "results.json").read_text())["tasks"]
    for name in ("arc_easy", "piqa"):
        assert scored[9][name]["n"] == expected[name]["n"]
        assert scored[9][name]["metric"] == expected[name]["metric"]
        # One item may tip over: the rows are padded to other lengths, and bf16 rounds.
        assert abs(scored[9][name]["value"] - expected[name]["value"]) * expected[name]["n"] <= 1.001


def test_monitors_get_the_logged_numbers_under_our_names(watched_run):
    board = EventAccumulator(str(watched_run / "tensorboard"))
    board.Reload()
    assert {"train/loss", "train/lr", "train/mfu", "train/epochs/prose", "train/save_s"} <= set(board.Tags()["scalars"])
    assert {"validation/prose/loss", "evaluation/piqa/value"} <= set(board.Tags()["scalars"])
    assert not any("Samples" in tag for tag in board.Tags()["scalars"])  # DeepSpeed's own
    events = board.Scalars("train/loss")
    assert [event.step for event in events] == list(range(1, 10))
    assert [event.value for event in events] == pytest.approx(losses(watched_run))
    (file,) = (watched_run / "csv").glob("*train_loss.csv")
    rows = list(csv.reader(file.open()))[1:]
    assert [float(value) for _, value in rows] == pytest.approx(losses(watched_run))


@pytest.mark.parametrize(
    ("section", "words"),
    [({"enabled": True}, "comet_ml is not installed"), ({"api_key": "secret"}, "comet.api_key would be copied")],
)
def test_a_monitor_that_cannot_be_used_is_refused(tmp_path, section, words):
    with pytest.raises(ConfigError, match=words) as caught:
        take_monitors({"comet": section}, tmp_path)
    assert "secret" not in str(caught.value)
