"""No command writes over a file that it did not write: refused in one line, before the work, and the file is as it was."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from serve import bench
from tinyllama.data.durable import refuse_unwritable, write_text
from tinyllama.errors import DataError
from tinyllama.sheets import Comparison
from train.before_launch import check_output

RESULTS = '{"format": "tinyllama-results-1", "tasks": {}}'
BENCH = '{"format": "tinyllama-bench-1"}'


def kept(path: Path, text: str, call) -> None:
    path.write_text(text)
    with pytest.raises(DataError, match=f"{path.name} exists and is not"):
        call()
    assert path.read_text() == text


def test_a_comparison_replaces_only_an_earlier_one(tmp_path):
    record = json.dumps({"format": "tinyllama-comparison-1", "models": []})
    shown = {"markdown": "## Suite\n| a |\n", "csv": "model,score\na,1\n", "json": record, "latex": "% Suite\n"}
    found = Comparison(lambda console: console.print("Suite"), shown.__getitem__, None)
    for form in (*shown, "table"):
        output = tmp_path / form
        for foreign in (RESULTS, BENCH, "my notes\n", "\0"):
            kept(output, foreign, lambda form=form, output=output: found.show(form, output))
        output.write_bytes(b"\xff\xfe")
        with pytest.raises(DataError, match="exists and is not"):
            found.show(form, output)
        output.write_text("")  # as mktemp makes it
        for _ in range(2):
            found.show(form, output)
    assert (tmp_path / "csv").read_text() == shown["csv"]


def test_a_report_never_replaces_the_results_of_its_name(tmp_path):
    """results.html has results.json beside it, which may be an evaluation."""
    build = pytest.importorskip("tinyllama.report.build")
    output = tmp_path / "results.html"
    kept(tmp_path / "results.json", RESULTS, lambda: build.refuse_to_replace(output))
    (tmp_path / "results.json").write_text('{"format": "tinyllama-report-1"}')
    kept(output, "<!DOCTYPE html>\n<title>mine</title>", lambda: build.refuse_to_replace(output))
    output.unlink()
    report = build.Report("title", "lead", "now", [], [])
    for _ in range(2):
        build.write(report, output)


def test_a_bench_never_replaces_other_files(tmp_path):
    kept(tmp_path / "bench.json", RESULTS, lambda: bench.refuse_to_replace(tmp_path))
    kept(tmp_path / "bench.json", "{", lambda: bench.refuse_to_replace(tmp_path))
    (tmp_path / "bench.json").write_text(BENCH)
    kept(tmp_path / "table.md", "# My notes\n", lambda: bench.refuse_to_replace(tmp_path))
    (tmp_path / "table.md").write_text("## Throughput\n")
    bench.refuse_to_replace(tmp_path)


def test_what_is_no_file_is_written_into_and_stays(tmp_path):
    """/dev/null and /dev/stdout too: a rename would put a file in their place, for all programs of the machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    refuse_unwritable(pipe)
    write_text(pipe, ["a", "b"])
    assert os.read(reader, 10) == b"ab"
    os.close(reader)
    assert pipe.is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_link_stays_one_and_what_it_names_is_written(tmp_path):
    (tmp_path / "below").mkdir()
    link = tmp_path / "latest.md"
    link.symlink_to("below/table.md")
    for text in ("new", "newer"):
        refuse_unwritable(link)
        write_text(link, [text])
        assert (tmp_path / "below" / "table.md").read_text() == text
    assert link.is_symlink()
    assert os.listdir(tmp_path / "below") == ["table.md"]


def test_a_run_never_replaces_the_configuration_of_an_export(tmp_path):
    kept(tmp_path / "config.json", '{"architectures": ["LlamaForCausalLM"]}', lambda: check_output(tmp_path))
    (tmp_path / "config.json").write_text('{"recipe": {}}')
    kept(tmp_path / "metrics.jsonl", '{"loss": 1}\n{"loss": 2}\n', lambda: check_output(tmp_path))
    for metrics in ("", '{"step": 0}\n{"st', '{"st'):
        (tmp_path / "metrics.jsonl").write_text(metrics)
        check_output(tmp_path)


def test_a_demo_wants_a_folder_of_its_own(tmp_path):
    from tinyllama.demo import run

    (tmp_path / "corpus").mkdir()
    with pytest.raises(DataError, match="holds other files"):
        run(tmp_path, tokenizer=None, ranks=1, settings=[], limit=None)
    kept(tmp_path / "steps.json", "[1]", lambda: run(tmp_path, tokenizer=None, ranks=1, settings=[], limit=None))
