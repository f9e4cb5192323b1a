"""Folders as they are fetched from a hub: documents are read once, and what is about them is named."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import fsspec
import pytest
import zstandard

from tinyllama.data.documents import Reader, Rules
from tinyllama.data.inputs import LeftOut, empty_line, find_inputs, left_out_line
from tinyllama.data.prepare import prepare
from tinyllama.errors import DataError

LINES = b'{"text": "one"}\n{"text": "two"}\n'
ABOUT = {
    "hidden": (".gitattributes", ".git/config", ".cache/huggingface/x.jsonl", "data/.ipynb_checkpoints/train-0.jsonl"),
    "about the data": ("README.md", "LICENSE", "LICENSE.txt", "data/README", "requirements.txt", "CITATION.cff"),
    "beside records": ("loader.py", "data/notes.md"),
    "of another form": ("dataset_infos.json", "data/stats.csv"),
}


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A snapshot in the hub's cache: every file a link to a blob; two files of one content share a blob."""
    blobs, root = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    names = [*(name for names in ABOUT.values() for name in names), "data/train-0.jsonl", "data/train-1.jsonl"]
    for number, name in enumerate([*names, "data/copy.jsonl"]):
        content = LINES.replace(b"one", b"%d" % number)
        blob = blobs / ("0" * 40 if name in ("data/train-0.jsonl", "data/copy.jsonl") else f"{number:040d}")
        blob.exists() or blob.write_bytes(content)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(blob)
    return root


def test_a_snapshot_of_the_hub_gives_its_documents_once(snapshot):
    left_out: LeftOut = {}
    assert [file.name for file in find_inputs([snapshot], left_out=left_out)] == [
        "data/copy.jsonl",
        "data/train-1.jsonl",
    ]
    assert left_out.pop("the same file as another") == [f"{snapshot}/data/train-0.jsonl (as data/copy.jsonl)"]
    assert left_out.pop("hidden") == [
        f"{snapshot}/{name}" for name in (".cache/", ".git/", ".gitattributes", "data/.ipynb_checkpoints/")
    ]
    assert left_out == {why: sorted(f"{snapshot}/{n}" for n in ABOUT[why]) for why in ABOUT if why != "hidden"}
    line = left_out_line({**left_out, "hidden": ["x"] * 4})
    assert "6 about the data" in line
    assert "4 hidden (x, x, x, ...)" in line
    assert "\n" not in line


def test_a_remote_folder_is_sifted_as_a_local_one():
    memory = fsspec.filesystem("memory")
    for name in (*(name for names in ABOUT.values() for name in names), "data/train-0.jsonl"):
        memory.pipe(f"/sifted/{name}", LINES)
    left_out: LeftOut = {}
    assert [file.name for file in find_inputs(["memory://sifted"], left_out=left_out)] == ["data/train-0.jsonl"]
    assert {why: len(names) for why, names in left_out.items()} == {why: len(names) for why, names in ABOUT.items()}


def test_a_folder_of_texts_keeps_its_sources(tmp_path):
    """Without records beside them, programs and notes are the documents."""
    for name in ("a.py", "b.md", "c.rst", "README.md", "d.txt"):
        (tmp_path / name).write_text("text")
    assert [file.name for file in find_inputs([tmp_path])] == ["a.py", "b.md", "c.rst", "d.txt"]
    assert find_inputs([tmp_path / "README.md"])  # who names it, means it


def test_names_of_documents_may_sound_like_names_about_the_data(tmp_path):
    """security.stackexchange.com is a site; a package's __init__.py is code. Records are never about themselves."""
    records = ["security.stackexchange.com.jsonl", "changes-2020.jsonl", "README.jsonl", "license.jsonl", "__a.jsonl"]
    texts = ["pkg/__init__.py", "pkg/security.py", "changes-of-1999.txt", "notice_of_leave.md", "authors/x.txt"]
    for folder, names in (("records", records), ("texts", texts)):
        for name in (*names, "LICENSE-MIT", "README_zh.md", "SECURITY.md", "__pycache__/x.py", "__MACOSX/x.jsonl"):
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_bytes(LINES)
        assert [file.name for file in find_inputs([tmp_path / folder])] == sorted(names)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.html", "<!DOCTYPE html><p>x"), ("a.php", "<html><?php"), ("a.svg", "<?xml version='1.0'?>"), ("a.xml", "<?xml"),
     ("a.js", '{"use strict"}'), ("a.wiki", "[[A link]]"), ("plain", "words"), ("notes.log", "[1] first")],
)  # fmt: skip
def test_texts_of_other_suffixes_are_read_where_they_are_named(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert list(Reader(*find_inputs([tmp_path / name]))) == [content]


@pytest.mark.parametrize("content", ['{"text": "x"}', '{"a\\"b" : 1}', "[", '["x"]', "{", "{}", '[[1], ["x"]]'])
def test_json_of_no_suffix_is_no_text(tmp_path, content):
    (tmp_path / "plain").write_text(content + "\n")
    with pytest.raises(DataError, match="looks like JSON"):
        find_inputs([tmp_path / "plain"])


def test_one_file_by_two_ways_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    os.link(tmp_path / "a.jsonl", tmp_path / "hard.jsonl")
    (tmp_path / "soft.jsonl").symlink_to("a.jsonl")
    monkeypatch.chdir(tmp_path)
    for other in ("hard.jsonl", "soft.jsonl", tmp_path / "a.jsonl", f"file://{tmp_path}/a.jsonl"):
        with pytest.raises(DataError, match=r"is given twice, the other time as a\.jsonl"):
            find_inputs(["a.jsonl", other])
    left_out: LeftOut = {}
    assert [file.name for file in find_inputs([tmp_path], left_out=left_out)] == ["a.jsonl"]
    assert len(left_out["the same file as another"]) == 2


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_no_file_is_refused_at_once(tmp_path, kind):
    path = Path("/dev/zero")
    if kind == "fifo":
        path = tmp_path / "a.jsonl"
        os.mkfifo(path)
    with pytest.raises(DataError, match="neither a file nor a folder"):
        find_inputs([path])


WRONG = [
    ("a.jsonl", gzip.compress(LINES, mtime=0), r"is gzip, not JSON lines; .*\.jsonl\.gz"),
    ("a.jsonl", zstandard.compress(LINES), r"is zstandard, not JSON lines; .*\.jsonl\.zst"),
    ("a.jsonl", b"PAR1....PAR1", "is parquet, not JSON lines"),
    ("a.jsonl", b"<!DOCTYPE html>\n<p>404", "is HTML, not JSON lines"),
    ("a.jsonl", b"\n<?xml version='1.0'?><Error>AccessDenied</Error>", "is HTML, not JSON lines"),
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer, .*git lfs pull"),
    ("a.jsonl", LINES.decode().encode("utf-16"), "is UTF-16, not JSON lines"),
    ("a.jsonl", LINES.decode().encode("utf-16-le"), "is UTF-16 or binary"),
    ("a.jsonl.gz", LINES, r"is JSON, not gzip; .*\.jsonl$"),
    ("a.jsonl.gz", zstandard.compress(LINES), "is zstandard, not gzip"),
    ("a.jsonl.gz", gzip.compress(gzip.compress(LINES, mtime=0), mtime=0), "is gzip, not JSON lines"),
    ("a.jsonl.zst", b"<html><body>404", "is HTML, not zstandard"),
    ("a.jsonl.zst", zstandard.compress(b"<html><body>404"), "is HTML, not JSON lines"),
    ("a.parquet", LINES, "is JSON, not parquet"),
    ("a.parquet", b"<html>", "is HTML, not parquet"),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
]


@pytest.mark.parametrize(("name", "content", "words"), WRONG)
def test_a_first_byte_that_denies_the_name_is_one_line(tmp_path, name, content, words):
    """Even where bad records may be skipped: this is no record."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as error:
        list(Reader(*find_inputs([tmp_path / name]), Rules(skip_bad=True)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("Grüße".encode("latin-1"), r"is not UTF-8 \("),
        ("Grüße".encode("utf-16"), "is not UTF-8 text: it looks like UTF-16"),
        ("plain words".encode("utf-16-le"), "is not UTF-8 text: it looks like UTF-16 or binary"),
        (gzip.compress(b"x", mtime=0), "is not UTF-8 text: it looks like gzip"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer"),
    ],
)
def test_texts_in_other_encodings_are_one_line(tmp_path, content, words):
    (tmp_path / "a.txt").write_bytes(content)
    (file,) = find_inputs([tmp_path / "a.txt"])
    with pytest.raises(DataError, match=words):
        list(Reader(file))
    reader = Reader(file, Rules(skip_bad=True))
    assert list(reader) == []
    assert len(reader.skipped) == 1


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"))
    assert list(Reader(*find_inputs([tmp_path / "a.txt"]))) == ["one\r\n"]
    assert list(Reader(*find_inputs([tmp_path / "b.jsonl"]))) == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('"a bare string"', "a.jsonl:2 is not a JSON object but a string"),
        ("7", "a.jsonl:2 is not a JSON object but a number"),
        ("null", "a.jsonl:2 is not a JSON object but null"),
        ("true", "a.jsonl:2 is not a JSON object but true or false"),
        ('["text"]', "a.jsonl:2 is not a JSON object but a list"),
        ('{"text": {"text": "x"}}', "a.jsonl:2 has no text or content string: its text is an object"),
        ('{"text": ["x"], "content": 1}', "its text is a list: its content is a number"),
    ],
)
def test_a_line_that_is_no_record_is_refused(tmp_path, line, words):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "one"}}\n{line}\n')
    with pytest.raises(DataError, match=words):
        list(Reader(*find_inputs([tmp_path / "a.jsonl"])))


def test_a_nested_field_can_hold_the_text(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"meta": {"body": "one", "n": 1}}, {"meta": {"body": "two", "n": 2}}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        assert list(Reader(*find_inputs([tmp_path / name]), Rules("meta.body"))) == ["one", "two"]
        with pytest.raises(DataError, match=r"meta\.text"):
            list(Reader(*find_inputs([tmp_path / name]), Rules("meta.text")))


def test_left_out_and_empty_files_are_said(snapshot, tokenizer, tmp_path):
    (snapshot / "data" / "empty.jsonl").touch()
    said: list[str] = []
    prepare([snapshot], tmp_path / "store", tokenizer, workers=0, validation_fraction=0, notice=said.append)
    assert said[0].startswith("left out: 6 about the data (")
    assert said[1] == f"1 input files are empty: {snapshot}/data/empty.jsonl"
    assert empty_line(find_inputs([snapshot / "data" / "train-0.jsonl"])) is None
