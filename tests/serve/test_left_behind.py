"""What vLLM writes for the length of a run lies in one folder of ours, which the next start clears if this one is killed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from serve.engine import importable_vllm


@pytest.mark.parametrize("length", [20, 100])
def test_temporary_files_of_a_block_go_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int):
    system = tmp_path / ("d" * length)
    system.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(system))
    for name in ("TMPDIR", "VLLM_RPC_BASE_PATH", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    with importable_vllm():
        folder = Path(tempfile.gettempdir())
        assert folder.parent == system
        assert os.environ["TMPDIR"] == str(folder)
        # The path of a socket has 107 bytes at most, whose name in it has 36.
        base = os.environ.get("VLLM_RPC_BASE_PATH", str(folder))
        assert base == (str(folder) if len(str(folder)) <= 70 else str(system))
        assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent == system  # compiled code is kept
        Path(tempfile.mkdtemp(prefix="vllm_dist_"), "file").touch()
    assert list(system.iterdir()) == []
    assert tempfile.gettempdir() == str(system)
    assert dict(os.environ) == before
