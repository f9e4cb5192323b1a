"""Exports that cannot be written, or are stopped: one line, and nothing is left; what was there before stays."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from test_stored import hugging_face

from tinyllama import export, quantize
from tinyllama.errors import ConfigError, UserError


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hugging_face(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond 5 kB: what is written fails where a full disk would fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def begin_and_fail(target: Path, error: BaseException) -> None:
    with export.appearing(target) as partial:
        (partial / "config.json").write_text("{}")
        raise error


def test_weights_that_cannot_be_written(llama: Path, tmp_path: Path, small_files: None):
    with pytest.raises(ConfigError, match=r"failed \(File too large\); nothing was left behind"):
        quantize.export_quantized(llama, tmp_path / "new" / "deep" / "out", "int8", check=False)
    assert list(tmp_path.iterdir()) == []


def test_an_older_export_stays(llama: Path, tmp_path: Path):
    target = tmp_path / "out"
    quantize.export_quantized(llama, target, "int8", check=False)
    before = export.content_sha256(target)
    with pytest.raises(UserError, match="cannot be"):
        begin_and_fail(target, UserError("it cannot be"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert export.content_sha256(target) == before
    quantize.export_quantized(llama, target, "fp8", check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert export.content_sha256(target) != before


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(errno.EROFS, "Read-only file system"),
        KeyboardInterrupt(),
        SystemExit(143),
        ValueError("a bug"),
        FileNotFoundError(errno.ENOENT, "gone"),
    ],
)
def test_however_it_ends_nothing_is_left(tmp_path: Path, error: BaseException):
    refused = "os error" in str(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EROFS)
    with pytest.raises(ConfigError if refused else type(error)):
        begin_and_fail(tmp_path / "a" / "out", error)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_scheme_leaves_nothing(llama: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    for target, words in (("file", "is not an export"), ("file/out", "Not a directory"), (".", "is no name")):
        with pytest.raises(UserError, match=words):
            quantize.export_quantized(llama, tmp_path / target if target != "." else Path(), "int8", check=False)
    with pytest.raises(UserError, match="is no scheme"):
        quantize.export_quantized(llama, tmp_path / "out", "int9", check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_too_little_room_is_said_before_anything_is_read(tmp_path: Path):
    with pytest.raises(ConfigError, match="MB are free there"):
        export.refuse_too_large(tmp_path / "a" / "b", 1 << 60)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_disk_that_is_full(llama: Path, tmp_path: Path):
    """A real one, of 72 kB, in a mount namespace."""
    (tmp_path / "disk").mkdir()
    script = "mount -t tmpfs -o size=72k none disk && head -c 60000 /dev/zero > disk/there; "
    script += (
        f"{sys.executable} -m tinyllama export {llama} -o disk/a/out --quantize int8 --no-check; echo $? $(ls -A disk)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = ["unshare", "--mount", "sh", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    if "permitted" in done.stderr or "not found" in done.stderr:
        pytest.skip("needs a mount namespace")
    assert done.stdout == "2 there\n", done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
