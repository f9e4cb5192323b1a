"""Input files to documents: every kind, every way to be broken, and nothing left out unsaid."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tinyllama.data.documents import Reader, Rules, preset_names, read_documents, read_preset
from tinyllama.data.inputs import find_inputs
from tinyllama.data.store import file_sha256
from tinyllama.errors import DataError

TEXTS = ["def f(x):\n    return x\n", "Grüße, 世界! 🙂", " leading space", "a", "line\r\nbreaks\n\n\n", "0\0zero"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
FRAMES = zstandard.compress(LINES[:50]) + zstandard.compress(LINES[50:])


def read(path: Path, **rules) -> tuple[list[str], Reader]:
    reader = Reader(find_inputs([path])[0], Rules(**rules))
    return list(reader), reader


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("no-newline-at-the-end.jsonl", LINES.rstrip(b"\n")),
        ("blank-lines.jsonl", LINES.replace(b"\n", b"\n\n\r\n")),
        ("b.jsonl.gz", gzip.compress(LINES)),
        ("c.jsonl.zst", zstandard.compress(LINES)),
        ("frames.jsonl.zst", FRAMES),
    ],
)
def test_lines(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    texts, reader = read(path)
    assert texts == TEXTS
    assert reader.num_records == len(TEXTS)
    assert reader.sha256 == file_sha256(path)
    assert reader.bytes_read == path.stat().st_size


@pytest.mark.parametrize("column", ["content", "text"])
def test_parquet(tmp_path, column):
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"other": range(len(TEXTS)), column: TEXTS}), path, row_group_size=2)
    texts, reader = read(path)
    assert texts == TEXTS
    assert reader.sha256 == file_sha256(path)


def test_text(tmp_path):
    (tmp_path / "e.txt").write_bytes(TEXTS[4].encode())
    assert read(tmp_path / "e.txt")[0] == [TEXTS[4]]


def test_order_of_files_does_not_depend_on_the_directory(tmp_path):
    for name in ("b/2.jsonl", "a/9.jsonl", "10.jsonl", "9.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(LINES)
    assert [f.name for f in find_inputs([tmp_path])] == ["10.jsonl", "9.jsonl", "a/9.jsonl", "b/2.jsonl"]
    with pytest.raises(DataError, match="given twice"):
        find_inputs([tmp_path, tmp_path / "a"])


SLIMPAJAMA = [
    {"text": "web", "meta": {"redpajama_set_name": "RedPajamaCommonCrawl"}},
    {"text": "code", "meta": {"redpajama_set_name": "RedPajamaGithub"}},
    {"text": "book", "meta": {"redpajama_set_name": "RedPajamaBook"}},
]


def test_slimpajama_comes_without_its_github_part(tmp_path):
    path = tmp_path / "chunk1" / "example_train_0.jsonl.zst"
    path.parent.mkdir()
    path.write_bytes(zstandard.compress("".join(json.dumps(row) + "\n" for row in SLIMPAJAMA).encode()))
    preset = read_preset("slimpajama")
    (file,) = find_inputs([tmp_path], preset.suffixes)
    reader = Reader(file, Rules(preset.text_field, preset.exclude))
    assert list(reader) == ["web", "book"]
    assert reader.excluded == {"meta.redpajama_set_name=RedPajamaGithub": 1}
    assert reader.num_records == 3


def test_a_record_without_the_field_it_is_judged_by_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "web", "meta": {}}\n')
    with pytest.raises(DataError, match=r"a.jsonl:1 has no field meta.redpajama_set_name"):
        list(read_documents(find_inputs([tmp_path])[0], Rules(exclude=read_preset("slimpajama").exclude)))


def test_starcoder(tmp_path):
    for language in ("python", "rust"):
        (tmp_path / language).mkdir()
        pq.write_table(pa.table({"id": ["0"], "content": [language]}), tmp_path / language / "train-0.parquet")
    preset = read_preset("starcoder")
    found = [
        list(Reader(f, Rules(preset.text_field, preset.exclude))) for f in find_inputs([tmp_path], preset.suffixes)
    ]
    assert found == [["python"], ["rust"]]


def test_exclusion_in_parquet(tmp_path):
    rows = [{"text": row["text"], "meta": row["meta"]} for row in SLIMPAJAMA]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    texts, reader = read(tmp_path / "a.parquet", exclude=read_preset("slimpajama").exclude)
    assert texts == ["web", "book"]
    assert sum(reader.excluded.values()) == 1


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (datetime.date(2020, 1, 2), "2020-01-02"),
        (datetime.datetime(2020, 1, 2, 3), "2020-01-02 03:00:00"),
        (decimal.Decimal("1.50"), "1.50"),
        (None, "null"),
        (True, "true"),
        ([datetime.date(2020, 1, 2)], '["2020-01-02"]'),
    ],
)
def test_documents_are_excluded_by_any_column_of_parquet(tmp_path, value, named):
    pq.write_table(
        pa.table(
            {"text": ["a", "b"], "field": [value, None if value else True]},
        ),
        tmp_path / "a.parquet",
    )
    texts, reader = read(tmp_path / "a.parquet", exclude=(("field", (named,)),))
    assert (texts, dict(reader.excluded)) == (["b"], {f"field={named}": 1})


def test_every_preset_is_complete():
    assert preset_names() == ["slimpajama", "starcoder"]
    for name in preset_names():
        preset = read_preset(name)
        assert preset.title
        assert preset.address.startswith("hf://")
    with pytest.raises(DataError, match="did you mean slimpajama"):
        read_preset("slimpyjama")


BROKEN = [
    ("a.jsonl", b'{"text": "fine"}\n{"text": \n', "a.jsonl:2 is not valid JSON"),
    ("b.jsonl", b'{"title": "x"}\n', "b.jsonl:1 has no text or content string"),
    ("c.jsonl", b'{"text": "\xff"}\n', "c.jsonl:1 is not valid JSON in UTF-8"),
    ("d.jsonl", b'{"text": "a\\ud800b"}\n', "d.jsonl:1 has a lone surrogate U\\+D800 at character 1"),
    ("e.jsonl", b'["text"]\n', "e.jsonl:1 is not a JSON object"),
    ("f.jsonl", b'{"text": 7}\n', "f.jsonl:1 has no text or content string"),
    ("g.txt", b"\xff\xfe\xff", "g.txt is not UTF-8"),
    ("h.jsonl", b"[" * 100_000 + b"\n", "h.jsonl:1 is not valid JSON"),
]
BROKEN_WHOLE = [
    ("a.jsonl.gz", gzip.compress(LINES * 99)[:-40], "breaks off"),
    ("b.jsonl.gz", gzip.compress(LINES)[:-9] + b"xxxxxxxxx", "breaks off"),
    ("c.jsonl.zst", zstandard.compress(LINES * 9999)[:-1], "breaks off"),
    ("d.jsonl.zst", zstandard.compress(LINES * 9999)[:100], "breaks off"),
    ("e.jsonl.zst", FRAMES + b"garbage", "breaks off"),
    ("f.jsonl.zst", b"not zstandard", "breaks off"),
    ("empty.jsonl.zst", b"", "breaks off"),
    ("empty.jsonl.gz", b"", "breaks off"),
    ("empty.parquet", b"", "not a readable parquet file"),
    ("g.parquet", b"not parquet", "not a readable parquet file"),
    ("h.parquet", None, "not a readable parquet file"),
]


@pytest.mark.parametrize(("name", "content", "words"), BROKEN)
def test_a_broken_record_is_refused_or_listed(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read(tmp_path / name)
    texts, reader = read(tmp_path / name, skip_bad=True)
    assert texts == (["fine"] if name == "a.jsonl" else [])
    assert len(reader.skipped) == 1
    assert reader.num_records == len(texts) + 1


@pytest.mark.parametrize(("name", "content", "words"), BROKEN_WHOLE)
def test_a_file_that_breaks_off_is_refused_even_where_records_may_be_skipped(tmp_path, name, content, words):
    path = tmp_path / name
    if content is None:
        pq.write_table(pa.table({"text": TEXTS * 99}), path, use_dictionary=False, write_page_checksum=True)
        damaged = bytearray(path.read_bytes())
        damaged[200] ^= 1
        content = bytes(damaged)
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        read(path, skip_bad=True)


def test_a_parquet_file_without_the_column_names_what_it_has(tmp_path):
    pq.write_table(pa.table({"body": TEXTS}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has columns body"):
        read(tmp_path / "a.parquet")


def test_long_and_empty_documents_are_listed(tmp_path):
    rows = ["x" * 101, "", "fine", "é" * 51, "y" * 100_000]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    texts, reader = read(tmp_path / "a.jsonl", max_document_bytes=100, skip_bad=True)
    assert texts == ["fine"]
    assert [number for number, _ in reader.skipped] == [0, 1, 3, 4]
    reasons = [reason for _, reason in reader.skipped]
    assert reasons[0] == "longer than 100 bytes (101)"
    assert reasons[1] == "empty"
    assert reasons[2] == "longer than 100 bytes (102)"
    assert reader.num_records == 5


def test_nulls_are_empty_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": null, "content": "fine"}\n')
    pq.write_table(pa.table({"content": ["fine", None]}), tmp_path / "b.parquet")
    for name, number in (("a.jsonl", 0), ("b.parquet", 1)):
        texts, reader = read(tmp_path / name)
        assert texts == ["fine"]
        assert reader.skipped == [(number, "empty")]


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary", "string_view"])
def test_every_kind_of_string_column(tmp_path, kind):
    types = {"large_string": pa.large_string(), "string_view": pa.string_view(), "string": pa.string()}
    array = pa.array(TEXTS).dictionary_encode() if kind == "dictionary" else pa.array(TEXTS, types[kind])
    pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0] == TEXTS


def test_nothing_behind_a_link_is_left_out_unsaid(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jsonl").write_bytes(LINES)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "chunk").symlink_to(tmp_path / "elsewhere")
    assert [file.name for file in find_inputs([tmp_path / "in"])] == ["chunk/a.jsonl"]
    (tmp_path / "in" / "b.jsonl").symlink_to(tmp_path / "missing")
    with pytest.raises(DataError, match=r"b\.jsonl is a link to a file that is not there"):
        find_inputs([tmp_path / "in"])
    (tmp_path / "in" / "b.jsonl").unlink()
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    with pytest.raises(DataError, match="reached twice"):
        find_inputs([tmp_path / "in"])


def test_nan_in_another_field_is_no_reason_to_refuse(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine", "score": NaN}\n')
    assert read(tmp_path / "a.jsonl")[0] == ["fine"]
