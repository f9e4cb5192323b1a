"""Temporary folders: those of dead processes are cleared, and no others."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from tinyllama import locks, scratch
from tinyllama.processes import Owner


@pytest.mark.parametrize(
    ("changes", "local", "goes"),
    [
        ({}, True, False),
        ({"ticks": 1}, True, True),  # its process id was given to another
        ({"ticks": 1}, False, True),
        ({"boot": "before"}, True, True),
        ({"boot": "before"}, False, False),  # another machine may have this one's name
        ({"host": "elsewhere"}, True, False),
        ({"pids": "pid:[1]"}, True, False),
    ],
)
def test_folders_of_the_dead_are_cleared(changes, local, goes, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "is_local", lambda path: local)
    folder = tmp_path / "ours-1"
    folder.mkdir()
    (folder / scratch.OWNER).write_text(json.dumps({**dataclasses.asdict(Owner.this()), **changes}))
    for name in ("ours-2", "theirs-1"):
        shutil.copytree(folder, tmp_path / name)
    (tmp_path / "ours-2" / scratch.OWNER).write_text("[]")  # says nothing of an owner
    scratch.clear("ours-", tmp_path)
    assert folder.exists() is not goes
    assert (tmp_path / "ours-2").exists()
    assert (tmp_path / "theirs-1").exists()


def test_a_folder_is_gone_after_its_block(tmp_path):
    with scratch.folder("ours-", tmp_path) as made:
        assert Owner.of(json.loads((made / scratch.OWNER).read_text())) == Owner.this()
        scratch.clear("ours-", tmp_path)
        assert made.is_dir()
    assert list(tmp_path.iterdir()) == []
