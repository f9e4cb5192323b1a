"""Where inputs come from: folders, links, servers that break off, files that change, and forms that are not read."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import ROOT

from tinyllama.data.documents import Reader, read_documents
from tinyllama.data.inputs import LeftOut, find_inputs
from tinyllama.data.store import file_sha256
from tinyllama.errors import DataError

TEXTS = ["def f(x):\n    return x\n", "Grüße, 世界! 🙂", "a"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
FRAMES = zstandard.compress(LINES[:50]) + zstandard.compress(LINES[50:])


@pytest.fixture
def server(tmp_path):
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()


def test_remote_files_read_as_local_ones(tmp_path, server):
    (tmp_path / "a.jsonl.zst").write_bytes(FRAMES)
    pq.write_table(pa.table({"content": TEXTS}), tmp_path / "b.parquet")
    for name in ("a.jsonl.zst", "b.parquet"):
        (file,) = find_inputs([f"{server}/{name}"])
        assert not file.is_local
        assert file.name == name
        reader = Reader(file)
        assert list(reader) == TEXTS
        assert reader.sha256 == file_sha256(tmp_path / name)


class Unreliable(SimpleHTTPRequestHandler):
    """Breaks off after a third of the file, refuses for a while, and then serves the rest."""

    asked = 0

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        type(self).asked += 1
        data = Path(self.translate_path(self.path)).read_bytes()
        if self.asked in (2, 3):
            self.send_error(503)
            return
        first, last = 0, len(data) - 1
        if given := self.headers.get("Range"):
            first, last = (int(n) if n else len(data) - 1 for n in given.removeprefix("bytes=").split("-"))
        self.send_response(206 if given else 200)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        self.wfile.write(data[first : first + len(data) // 3] if self.asked == 1 else data[first : last + 1])

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(Path(self.translate_path(self.path)).stat().st_size))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()


def test_a_connection_that_breaks_is_taken_up_again(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    lines = b"".join(b'{"text": "%d"}\n' % number for number in range(20_000))
    (tmp_path / "a.jsonl").write_bytes(lines)
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Unreliable, directory=str(tmp_path)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    (file,) = find_inputs([f"http://127.0.0.1:{httpd.server_address[1]}/a.jsonl"])
    Unreliable.asked = 0
    reader = Reader(file)
    assert list(reader) == [str(number) for number in range(20_000)]
    assert reader.sha256 == file_sha256(tmp_path / "a.jsonl")
    assert Unreliable.asked >= 4
    httpd.shutdown()
    httpd.server_close()
    with pytest.raises(DataError, match=r"/a\.jsonl cannot be (read|opened)"):
        list(Reader(file))


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    for name, more in (("a.jsonl", LINES), ("b.txt", b"more")):
        path = tmp_path / name
        path.write_bytes(LINES)
        (file,) = find_inputs([path])
        documents = iter(Reader(file))
        next(documents)
        with open(path, "ab") as stream:
            stream.write(more)
        with pytest.raises(DataError, match=f"{name} changed while it was read"):
            list(documents)


def test_a_null_text_beside_content_is_no_empty_document(tmp_path):
    """In parquet as in JSON lines: the first of the two fields that is a string."""
    pq.write_table(pa.table({"text": [None, "a"], "content": ["b", "c"]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"text": null, "content": "b"}\n{"text": "a", "content": "c"}\n')
    for name in ("a.parquet", "b.jsonl"):
        assert list(Reader(*find_inputs([tmp_path / name]))) == ["b", "a"]


def test_large_rows_of_parquet_are_few_at_a_time(tmp_path):
    """4 MiB at a time, where the pages of the file are no larger: a row group would otherwise be in memory at once."""
    rng = random.Random(0)
    texts = [rng.randbytes(500_000).hex() for _ in range(64)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", use_dictionary=False, write_batch_size=1)
    script = (
        "import re; from tinyllama.data.inputs import LeftOut, find_inputs; from tinyllama.data.documents import Reader\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
        f"import pyarrow.parquet; before = peak(); n = sum(len(t) for t in Reader(*find_inputs([{str(tmp_path)!r}])))\n"
        "print(n, peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    characters, grown_mib = done.stdout.split()
    assert int(characters) == 64_000_000
    assert float(grown_mib) < 48


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.bz2", "a.csv", "a.tar", "a.arrow"])
def test_forms_that_are_not_read_are_refused_by_name_and_told_of_in_folders(tmp_path, name):
    (tmp_path / name).write_bytes(LINES)
    with pytest.raises(DataError, match=f"{name} is of a form that is not read"):
        find_inputs([tmp_path / name])
    (tmp_path / "b.ndjson").write_bytes(LINES)
    left_out: LeftOut = {}
    (file,) = find_inputs([tmp_path], left_out=left_out)
    assert file.kind == "lines"
    assert left_out == {"of another form": [str(tmp_path / name)]}


def test_names_that_cannot_be_used_are_one_line(tmp_path):
    (tmp_path / "link.jsonl").symlink_to("link.jsonl")
    with pytest.raises(DataError, match=r"link\.jsonl cannot be looked at"):
        find_inputs([tmp_path])
    (tmp_path / "link.jsonl").unlink()
    with pytest.raises(DataError, match="cannot be looked at"):
        find_inputs([tmp_path / ("x" * 300)])
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")).write_bytes(LINES)
    with pytest.raises(DataError, match="is not UTF-8"):
        find_inputs([tmp_path])


def test_marks_of_remote_content_change_its_version():
    from tinyllama.data.inputs import _version

    for mark in ("ETag", "blob_id", "xet_hash", "Last-Modified"):
        assert _version({mark: "1", "size": 3}) != _version({mark: "2", "size": 3})


def test_remote_folders_and_patterns_are_listed():
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("/corpus/b/2.jsonl", "/corpus/a/1.jsonl", "/corpus/readme.pdf"):
        memory.pipe(name, LINES)
    found = find_inputs(["memory://corpus"])
    assert [file.name for file in found] == ["a/1.jsonl", "b/2.jsonl"]
    assert list(read_documents(found[1])) == TEXTS
    assert [file.name for file in find_inputs(["memory://corpus/*/1.jsonl"])] == ["a/1.jsonl"]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("s3://bucket/x.jsonl", r"tinyllama\[s3\]"),
        ("gs://bucket/x.jsonl", r"tinyllama\[gcs\]"),
        ("nosuch://x", "nosuch"),
        ("http://127.0.0.1:9/x.jsonl", "127.0.0.1:9"),
        ("memory://missing/x.jsonl", "does not exist"),
        ("/missing/x.jsonl", "does not exist"),
    ],
)
def test_addresses_that_cannot_be_read_are_one_line(address, words):
    import importlib.util

    from tinyllama.errors import UserError

    if address.startswith("s3") and importlib.util.find_spec("s3fs"):
        pytest.skip("s3fs is installed")
    if address.startswith("gs") and importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    with pytest.raises(UserError, match=words) as error:
        find_inputs([address])
    assert "\n" not in str(error.value)
