"""Temporary folders that say whose they are, so that those of killed processes are cleared by the next one."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tinyllama import locks
from tinyllama.processes import Owner

OWNER = ".owner"


def make(prefix: str, parent: Path | None = None) -> Path:
    """A new folder, in the system's one for temporary files if no other is given; removed when this process ends."""
    where = parent or Path(tempfile.gettempdir())
    clear(prefix, where)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=where))
    (folder / OWNER).write_text(json.dumps(dataclasses.asdict(Owner.this())))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextlib.contextmanager
def folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """The same for the length of a block."""
    made = make(prefix, parent)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def clear(prefix: str, where: Path) -> None:
    """Remove the folders of ours there whose processes are known to be dead; no other's, and no living one's."""
    with contextlib.suppress(OSError):
        for path in list(where.iterdir()):
            if path.name.startswith(prefix) and path.is_dir() and not path.is_symlink():
                with contextlib.suppress(OSError, ValueError, RecursionError):
                    owner = Owner.of(json.loads((path / OWNER).read_text()))
                    if owner and _is_dead(owner, path) and path.stat().st_uid == os.getuid():
                        shutil.rmtree(path, ignore_errors=True)


def _is_dead(owner: Owner, path: Path) -> bool:
    """Whether the process is known to be: where machines share the file system, another may have the name of this one."""
    return owner.is_alive() is False and (owner.boot == Owner.this().boot or locks.is_local(path))
