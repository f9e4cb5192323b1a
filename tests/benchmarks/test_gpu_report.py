"""The report of a GPU day, on rows that a day without a GPU left (standin_rows.jsonl); the step benchmark's failures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gpu_report
import pytest
import train_step
from gpu_day import rows
from gpu_day.conduct import ROWS

from tinyllama.model.config import ModelConfig

RECORDED = Path(__file__).with_name("standin_rows.jsonl")
MARKED = f"# GPU\n\n{gpu_report.BEGIN}\nold\n{gpu_report.END}\n\nafter\n"


@pytest.fixture
def day(tmp_path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copy(RECORDED, folder / ROWS)
    return folder


def report(folder: Path, *more: str) -> int:
    return gpu_report.main([str(folder), "--results", str(folder.parent / "results"), *more])


def test_rows_of_a_cpu_are_not_taken_for_a_gpus(day, tmp_path, capsys):
    docs = tmp_path / "gpu.md"
    docs.write_text(MARKED)
    assert report(day, "--docs", str(docs)) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert docs.read_text() == MARKED
    assert not (tmp_path / "results").exists()


def test_rows_of_a_cpu_can_be_kept_without_a_figure_of_a_gpu(day, tmp_path, capsys):
    assert report(day, "--output", str(tmp_path / "kept.json")) == 0
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert (kept["device"], kept["card"], kept["peak_flops"], kept["shape"]) == ("cpu", None, None, "tiny")
    assert not [entry for entry in kept["rows"] if "mfu" in (entry.get("values") or {})]
    recorded = rows.finished(rows.read(RECORDED))
    assert {entry["stage"] for entry in recorded} == set(range(7))
    assert len(kept["rows"]) == len({(e["stage"], e["row"]) for e in recorded})
    page = capsys.readouterr().out
    assert "no figures of a GPU" in page
    assert "skipped: needs a GPU" in page
    rates = [entry["values"] for entry in recorded if entry["row"].startswith("by blocks, ZeRO-1, micro 2")]
    assert f"| {rates[-1]['tokens_per_s']:,.0f} |" in page
    assert "| - |" in page  # where a GPU would have its MFU


def as_gpu(folder: Path, card: str, tokens_per_s: float) -> None:
    """The rows as a GPU would have left them: for the arithmetic of the report alone."""
    found = rows.read(folder / ROWS)
    flops = ModelConfig().flops_per_token(2048)
    for entry in found:
        if entry["row"] == "versions" and entry["status"] == rows.OK:
            entry["values"].update(device="cuda", card=card, shape="full", driver="580.0")
        if "flops_per_s" in (entry.get("values") or {}):
            entry["values"].update(tokens_per_s=tokens_per_s, flops_per_s=tokens_per_s * flops, flops_per_token=flops)
    (folder / ROWS).write_text("".join(json.dumps(entry) + "\n" for entry in found))


def test_mfu_is_of_the_cards_data_sheet_and_every_card_has_its_section(day, tmp_path):
    docs = tmp_path / "gpu.md"
    docs.write_text(MARKED)
    # 7.314 GFLOP a token, 989 TFLOP/s: 60% is 81.1k tokens a second.
    for card, rate in (("NVIDIA H100 80GB HBM3", 0.6 * 989e12 / 7.314e9), ("NVIDIA H200", 50_000.0)):
        shutil.copy(RECORDED, day / ROWS)
        as_gpu(day, card, rate)
        assert report(day, "--docs", str(docs)) == 0
    h100 = json.loads((tmp_path / "results" / "gpu_h100_80gb_hbm3.json").read_text())
    mfus = [entry["values"]["mfu"] for entry in h100["rows"] if "mfu" in (entry.get("values") or {})]
    assert mfus
    assert mfus == pytest.approx([0.6] * len(mfus), rel=1e-3)
    assert h100["peak_flops"] == 989e12
    text = docs.read_text()
    assert text.startswith("# GPU\n\n" + gpu_report.BEGIN)
    assert text.endswith(gpu_report.END + "\n\nafter\n")
    assert "old" not in text
    assert text.index("### NVIDIA H100 80GB HBM3") < text.index("### NVIDIA H200")
    assert "| 60.0% |" in text
    assert "| 37.0% |" in text  # 50,000 x 7.314e9 / 989e12


def test_a_card_without_a_data_sheet_has_no_mfu(day, tmp_path):
    docs = tmp_path / "gpu.md"
    docs.write_text(MARKED)
    as_gpu(day, "NVIDIA H999", 1e6)
    assert report(day, "--docs", str(docs)) == 0
    kept = json.loads((tmp_path / "results" / "gpu_h999.json").read_text())
    assert kept["peak_flops"] is None
    assert "no data sheet" in kept["peak_flops_source"]
    assert not [entry for entry in kept["rows"] if "mfu" in (entry.get("values") or {})]


def test_a_row_that_was_measured_again_counts_once_and_a_failure_says_why(day, tmp_path, capsys):
    mine = rows.Rows(day / ROWS, 2, "zero1")
    mine.add("by blocks, ZeRO-1, micro 2", rows.FAILED, error="Traceback ...\ntorch.OutOfMemoryError: 80 GiB")
    assert report(day, "--output", str(tmp_path / "kept.json")) == 0
    kept = json.loads((tmp_path / "kept.json").read_text())
    (row,) = (entry for entry in kept["rows"] if entry["row"] == "by blocks, ZeRO-1, micro 2")
    assert row["error"].startswith("Traceback")
    assert "| failed: torch.OutOfMemoryError: 80 GiB |" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", '{"stage": 0, "row": "install", "status": "ok", "part": "install"}\n'])
def test_a_folder_that_says_too_little_is_one_line(day, text, capsys):
    (day / ROWS).write_text(text)
    assert report(day) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_page_without_markers_is_one_line(day, tmp_path, capsys):
    docs = tmp_path / "gpu.md"
    docs.write_text("# GPU\n")
    as_gpu(day, "NVIDIA H200", 1.0)
    assert report(day, "--docs", str(docs)) == 2
    assert "lacks the lines" in capsys.readouterr().err


def test_the_step_benchmark_keeps_all_that_a_failed_row_printed_and_names_a_timeout():
    failed = train_step.in_own_process("--one", "no such row", timeout_s=120)["failed"]
    assert "Traceback" in failed
    assert train_step.reason_of(failed) == "KeyError: 'no such row'"
    late = train_step.in_own_process("--one", "no such row", timeout_s=0.01)["failed"]
    assert train_step.reason_of(late) == "timed out after 0 s"
    assert train_step.merged(None, {"failed": failed})["failed"] == failed
