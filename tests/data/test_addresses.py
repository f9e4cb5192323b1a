"""Addresses: the form follows the path, a name is itself before it is a pattern, and no secret is written anywhere."""

from __future__ import annotations

import json
import os
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
import zstandard
from fsspec.implementations.memory import MemoryFileSystem

from tinyllama.data.addresses import identity, shown, without_secrets
from tinyllama.data.documents import Reader
from tinyllama.data.inputs import find_inputs
from tinyllama.data.prepare import prepare
from tinyllama.data.store import read_list, verify
from tinyllama.errors import DataError

LINES = b'{"text": "one"}\n{"text": "two"}\n'
SECRET = "sEcReT"


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; /moved/X is at /X with a signature, /forbidden/X answers 403 to a signed link."""

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        if self.path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("Location", f"/{self.path.removeprefix('/moved/')}?X-Amz-Signature={SECRET}")
            self.end_headers()
        elif self.path.startswith("/forbidden"):
            self.send_error(403)
        elif self.path.startswith("/get"):
            self.path = "/x.jsonl"
            self.answer()
        else:
            self.answer()

    def answer(self) -> None:
        super().do_GET() if self.command == "GET" else super().do_HEAD()

    do_HEAD = do_GET  # type: ignore[assignment]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    for name in ("x.jsonl", "a b.jsonl", "ü#1.jsonl", "odd[1].jsonl", "q?.jsonl", "s*.jsonl", "nameless"):
        (folder / name).write_bytes(LINES)
    (folder / "y.jsonl.zst").write_bytes(zstandard.compress(LINES))
    with zipfile.ZipFile(folder / "z.zip", "w") as archive:
        for name in ("x.jsonl", "b/odd[1].jsonl", ".cache/x.jsonl"):
            archive.writestr(name, LINES)
    return folder


@pytest.fixture(scope="module")
def server(folder) -> Iterator[str]:
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    httpd.server_close()


def documents(address: str | Path) -> list[str]:
    return [text for file in find_inputs([address]) for text in Reader(file)]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("x.jsonl?download=true", "x.jsonl"),
        ("y.jsonl.zst?X-Amz-Expires=60&X-Amz-Signature=" + SECRET, "y.jsonl.zst"),
        ("x.jsonl#page=2", "x.jsonl"),
        ("a%20b.jsonl", "a b.jsonl"),
        ("%C3%BC%231.jsonl?a=*", "ü#1.jsonl"),
        ("odd[1].jsonl", "odd[1].jsonl"),
        ("odd%5B1%5D.jsonl", "odd[1].jsonl"),
        ("moved/x.jsonl", "x.jsonl"),
        ("get/download?file=data/x.jsonl", "x.jsonl"),
        ("get/1?response-content-disposition=attachment%3B%20filename%3D%22x.jsonl%22&sig=" + SECRET, "x.jsonl"),
    ],
)
def test_the_form_of_a_url_follows_its_path_and_not_its_query(server, path, name):
    (file,) = find_inputs([f"{server}/{path}"])
    assert file.name == name
    assert file.kind == "lines"
    assert list(Reader(file)) == ["one", "two"]
    assert SECRET not in repr(file)


@pytest.mark.parametrize("path", ["nameless", "moved/nameless", "nameless?download=true"])
def test_what_has_no_form_is_never_read_as_one_document_of_json(server, folder, path):
    for address in (f"{server}/{path}", str(folder / "nameless")):
        with pytest.raises(DataError, match=r"looks like JSON.*its name does not tell its form; .*\.jsonl\.gz"):
            find_inputs([address])


@pytest.mark.parametrize("name", ["odd[1].jsonl", "q?.jsonl", "s*.jsonl", "a b.jsonl", "ü#1.jsonl"])
def test_a_name_that_exists_is_no_pattern(folder, name):
    class Bucket(MemoryFileSystem):
        """As object stores are: a name is a key, and nothing is known of folders."""

        protocol = "bucket"
        store = {}  # noqa: RUF012

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.removeprefix("bucket://").strip("/")

    fsspec.register_implementation("bucket", Bucket, clobber=True)
    for protocol in ("memory", "bucket"):
        fsspec.filesystem(protocol).pipe(f"/names/{name}", LINES)
        (file,) = find_inputs([f"{protocol}://names/{name}"])
        assert (file.name, list(Reader(file))) == (name, ["one", "two"])
    assert documents(folder / name) == ["one", "two"]
    fsspec.filesystem("memory").pipe(f"/in[x]/{name}/1.jsonl", LINES)
    assert [file.name for file in find_inputs([f"memory://in[x]/{name}"])] == ["1.jsonl"]


def test_members_of_archives(folder):
    for name in ("x.jsonl", "b/odd[1].jsonl"):
        assert documents(f"zip://{name}::{folder}/z.zip") == ["one", "two"]
    for pattern in ("", "*.jsonl"):
        found = find_inputs([f"zip://{pattern}::{folder}/z.zip"])
        assert [file.name for file in found] == (["b/odd[1].jsonl", "x.jsonl"] if not pattern else ["x.jsonl"])
        assert [list(Reader(file)) for file in found] == [["one", "two"]] * len(found)
    with pytest.raises(DataError, match=r"zip://no\.jsonl::.* does not exist"):
        find_inputs([f"zip://no.jsonl::{folder}/z.zip"])
    for other in (f"zip://x.jsonl::file://{folder}/z.zip", f"zip://x.jsonl::{folder}/../{folder.name}/z.zip"):
        with pytest.raises(DataError, match="is given twice"):
            find_inputs([f"zip://x.jsonl::{folder}/z.zip", other])
    with pytest.raises(DataError, match=r"missing\.zip"):
        find_inputs([f"zip://x.jsonl::{folder}/missing.zip"])


def test_files_of_this_machine_whose_names_look_like_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a::b.jsonl", "p%20q.jsonl", "c d.jsonl"):
        Path(name).write_bytes(LINES)
    assert documents("a::b.jsonl") == documents(f"file://{tmp_path}/p%20q.jsonl") == ["one", "two"]
    assert documents(f"file://{tmp_path}/c%20d.jsonl") == ["one", "two"]


def test_what_may_be_shown_of_an_address():
    signed = (
        f"https://user:{SECRET}@host/a/x.jsonl?X-Amz-Credential={SECRET}&sig={SECRET}&file=x&other={SECRET}#{SECRET}"
    )
    assert shown(signed) == "https://host/a/x.jsonl?file=x&other=***"
    assert shown(f"https://host/x?{SECRET}") == "https://host/x?***"
    assert shown(f"https://host/x?file=https%3A%2F%2Fu:{SECRET}@h") == "https://host/x?file=***"
    assert (
        shown(f"zip://a?b.jsonl::https://u:{SECRET}@host/z.zip?Signature={SECRET}")
        == "zip://a?b.jsonl::https://host/z.zip"
    )
    assert shown(f"s3://key:{SECRET}@bucket/a?b.jsonl") == "s3://bucket/a?b.jsonl"
    assert shown("github://org:repo@main/x.jsonl") == "github://org:repo@main/x.jsonl"
    assert SECRET not in without_secrets(f"403, url='https://host/x?X-Amz-Signature={SECRET}'\nand {signed}")
    # Signed again it is the same file; another file of one path is another.
    again = "https://host/a/x.jsonl?X-Amz-Credential=2&sig=3&file=x&other=" + SECRET
    assert identity(signed) == identity(again) != identity(again.replace("file=x", "file=y"))


def test_secrets_are_written_nowhere_and_inputs_of_one_name_are_told_apart(server, folder, tokenizer, tmp_path):
    host = server.removeprefix("http://")
    here = tmp_path / "other" / "x.jsonl"
    here.parent.mkdir()
    here.write_bytes(LINES)
    given = [
        f"http://user:{SECRET}@{host}/x.jsonl?X-Amz-Signature={SECRET}&download=true",
        f"{server}/get/x.jsonl?key={SECRET}",
        here,
    ]
    seen: list[bytes] = []

    def look(_) -> None:
        seen.extend(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())

    prepare(given, tmp_path / "store", tokenizer, workers=0, validation_fraction=0, progress=look)
    prepare(given[:1], tmp_path / "again", tokenizer, workers=1, validation_fraction=0, progress=look)
    look(None)
    assert len(seen) > 20
    assert not [content for content in seen if SECRET.encode() in content]
    entries = list(read_list(tmp_path / "store", "inputs.jsonl"))
    assert [entry["name"] for entry in entries] == [f"{host}/x.jsonl", "get/x.jsonl", "other/x.jsonl"]
    assert [entry["address"] for entry in entries] == [
        f"{server}/x.jsonl?download=true",
        f"{server}/get/x.jsonl?key=***",
        str(here),
    ]
    for executor in ("slurm", "ray"):
        with pytest.raises(DataError, match="password or signature") as error:
            prepare(given, tmp_path / "third", tokenizer, executor=executor)
        assert SECRET not in str(error.value)


def test_errors_of_servers_hold_no_secret(server):
    for path in ("forbidden/x.jsonl", "missing.jsonl", "moved/missing.jsonl"):
        with pytest.raises(DataError) as error:
            find_inputs([f"{server}/{path}?X-Amz-Signature={SECRET}"])
        assert SECRET not in str(error.value)
        assert "\n" not in str(error.value)


def test_a_server_that_refuses_or_is_not_there_is_not_a_file_that_does_not_exist(server):
    with pytest.raises(DataError, match=r"forbidden/x\.jsonl cannot be fetched \(.*403"):
        find_inputs([f"{server}/forbidden/x.jsonl?X-Amz-Signature={SECRET}"])
    with pytest.raises(DataError, match=r"cannot be fetched \(.*Connect"):
        find_inputs(["http://127.0.0.1:1/x.jsonl"])
    with pytest.raises(DataError, match=r"input .*/missing\.jsonl does not exist"):
        find_inputs([f"{server}/missing.jsonl"])


def test_a_store_is_the_same_wherever_its_inputs_lay(tokenizer, tmp_path):
    made = []
    for place in ("a", "b"):
        (tmp_path / place / "in").mkdir(parents=True)
        (tmp_path / place / "in" / "x.jsonl").write_bytes(LINES)
        made.append(prepare([tmp_path / place / "in"], tmp_path / place / "store", tokenizer, workers=0))
    assert made[0].sha256 == made[1].sha256
    store = tmp_path / "a" / "store"
    verify(store)
    content = (store / "inputs.jsonl").read_text()
    assert json.loads(content)["address"] == str(tmp_path / "a" / "in" / "x.jsonl")
    (store / "inputs.jsonl").write_text(content.replace(f"{os.sep}a{os.sep}", f"{os.sep}c{os.sep}"))
    with pytest.raises(DataError, match=r"inputs\.jsonl does not match"):
        verify(store)
