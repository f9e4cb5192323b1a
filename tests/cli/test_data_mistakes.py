"""`tinyllama data` given what it cannot use: one red line, exit code 2, and nothing half-done."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import WITHOUT_PRIVILEGES, preparing, skip_unless_privileges_can_be_dropped, tinyllama

from tinyllama.data.store import file_sha256, read_manifest


@pytest.fixture
def store(stores: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    shutil.copytree(stores / "prose", tmp_path / "prose")
    shutil.copyfile(stores / "tokenizer.model", tmp_path / "tokenizer.model")
    return tmp_path / "prose"


def refused(*arguments: object, **options) -> str:
    done = tinyllama(*arguments, check=False, **options)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    return line


def test_inspect_of_a_damaged_store(store):
    assert "--samples -1" in refused("data", "inspect", store, "--samples", "-1")
    missing = store / "missing.model"
    assert "missing.model does not exist" in refused("data", "inspect", store, "--tokenizer", missing)
    documents = store / "train-000000.documents"
    whole = documents.read_bytes()
    for size, words in (
        (len(whole) - 3, "breaks off"),
        (len(whole) - 8, "its manifest says"),
        (0, "its manifest says"),
    ):
        documents.write_bytes(whole[:size])
        assert words in refused("data", "inspect", store)
    # Starts that do not ascend, that lie beyond the shard, and that are no number of 63 bits.
    for damaged in (whole[:8] + bytes(len(whole) - 8), whole[:-8] + b"\xff\xff\xff" + bytes(5), b"\xff" * 8):
        documents.write_bytes(damaged)
        assert "train-000000.documents makes no sense" in refused("data", "inspect", store)
    documents.write_bytes(whole)
    with open(store / "train-000000.tokens", "r+b") as stream:
        stream.seek(1000)
        stream.write((600).to_bytes(2, "little"))
    assert "holds token 600 of 600" in refused("data", "inspect", store)


@pytest.mark.parametrize("name", ["shards.jsonl", "inputs.jsonl", "skipped.jsonl"])
def test_verify_with_lists_that_cannot_be_read(store, name):
    (store / name).rename(store / "away")
    assert f"{name} is missing" in refused("data", "verify", store)
    (store / name).mkdir()
    assert f"{name} cannot be read" in refused("data", "verify", store)
    (store / name).rmdir()
    (store / name).write_text("{")
    assert f"{name} does not match its checksum" in refused("data", "verify", store)


def test_verify_with_a_list_that_is_none_of_shards(store):
    """Its checksum is right: somebody has made it so."""
    (store / "shards.jsonl").write_text('{"name": "train-000000"}\n')
    manifest = read_manifest(store)
    lists = {**manifest.lists, "shards.jsonl": file_sha256(store / "shards.jsonl")}
    (store / "manifest.json").write_text(dataclasses.replace(manifest, lists=lists).to_json())
    assert "shards.jsonl is no list of shards" in refused("data", "verify", store)


def test_what_may_not_be_read_or_written(store, tmp_path):
    skip_unless_privileges_can_be_dropped()
    bundle, closed = tmp_path / "bundle" / "set" / "config", tmp_path / "closed"
    bundle.mkdir(parents=True)
    closed.mkdir(mode=0o500)
    items = bundle / "test.jsonl"
    items.write_text('{"question": "why"}\n')
    contamination = ["data", "contamination", store, "--against", tmp_path / "bundle", "--output"]

    def denied(*arguments: object) -> str:
        line = refused(*arguments, under=WITHOUT_PRIVILEGES)
        assert "Permission denied" in line
        return line

    assert str(closed / "r.json") in denied(*contamination, closed / "r.json")
    assert str(closed / "corpus") in denied("data", "corpus", "--output", closed / "corpus")
    for path, words, command in (
        (items, "test.jsonl cannot be read", [*contamination, tmp_path / "r.json"]),
        (store / "inputs.jsonl", "inputs.jsonl cannot be read", ["data", "verify", store]),
        (store / "train-000000.documents", "train-000000.documents cannot be read", ["data", "inspect", store]),
        (store, "manifest.json cannot be read", ["data", "verify", store]),
        (tmp_path, "manifest.json cannot be read", ["data", "inspect", store]),
    ):
        mode = path.stat().st_mode
        path.chmod(0o600 if path.is_dir() else 0)  # folders that may be listed, and no more
        assert words in denied(*command)
        path.chmod(mode)
    assert not (tmp_path / "r.json").exists()


def test_verify_of_what_is_no_store(store):
    assert "is not a token store" in refused("data", "verify", store.parent)
    assert "is not a token store" in refused("data", "verify", store / "manifest.json")


def test_contamination_without_anything_to_compare(store, tmp_path):
    bundle = tmp_path / "bundle" / "set" / "config"
    bundle.mkdir(parents=True)
    (bundle / "test.jsonl").write_text("")
    report = tmp_path / "report.json"
    arguments = ["data", "contamination", store, "--output", report, "--against"]
    assert "holds no text" in refused(*arguments, tmp_path / "bundle")
    for rows, words in (
        ('{"question": ', "test.jsonl is corrupt"),
        ("[" * 100_000, "test.jsonl is corrupt"),
        ('{"question": "\\ud800"}', "test.jsonl: text has a lone surrogate U+D800"),
    ):
        (bundle / "test.jsonl").write_text(rows)
        assert words in refused(*arguments, tmp_path / "bundle")
    for number in ("0", "-1"):
        assert f"--threads {number}" in refused(*arguments, "mini", "--threads", number)
    assert not report.exists()
    assert not list(tmp_path.glob("report*"))


def test_contamination_that_could_not_be_written_is_not_begun(store, tmp_path):
    """The bundle is not even looked for."""
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "report.json", tmp_path):
        arguments = ["data", "contamination", store, "--against", tmp_path / "nowhere", "--output", output]
        assert f"writing {tmp_path}" in refused(*arguments)


def test_a_corpus_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert f"writing {tmp_path / 'file'}" in refused("data", "corpus", "--output", tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]


def test_what_was_given_is_printed_as_it_was_typed(tokenizer_model, tmp_path):
    """Square brackets are markup to the library that prints."""
    folder = tmp_path / "[bold]in[red]"
    folder.mkdir()
    lines = [{"text": "kept", "meta": "x"}, {"text": "gone", "meta": "[bold]"}, {"text": "", "meta": "x"}]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "b.csv").write_text("")
    arguments = preparing(folder, folder / "[dim]out", tokenizer_model)
    assert "[bold]in[red]" in refused(*arguments)
    arguments[4] = tmp_path / "[dim]out"
    done = tinyllama(*arguments, "--exclude", "meta=[bold]", "--validation-fraction", "0")
    assert "excluded: 1 documents with meta=[bold]" in done.stdout
    assert "[dim]out/skipped.jsonl" in done.stdout.replace("\n", "")
    assert "[bold]in[red]/b.csv" in done.stderr.replace("\n", "")
    assert "[dim]out holds" in tinyllama("data", "verify", arguments[4]).stdout
    assert "[dim]outbylength" in "".join(tinyllama("data", "inspect", arguments[4]).stdout.split())
    assert read_manifest(arguments[4]).documents("train") == 1
    bundle = tmp_path / "bundle" / "[bold]set" / "[red]config"
    bundle.mkdir(parents=True)
    (bundle / "test.jsonl").write_text('{"question": "kept or gone?"}\n')
    contamination = ["data", "contamination", arguments[4], "--against", tmp_path / "bundle", "--output"]
    shown = tinyllama(*contamination, tmp_path / "[dim]report.json").stdout
    assert "[bold]set/[red]config/test" in shown
    assert f"{tmp_path}/[dim]report.json" in shown
