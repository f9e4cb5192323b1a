"""Names of tasks and suites, and the only way from such a name to a path.

A name comes from outside: the command line, a suite's or a task's file, a results file. It names a file in a folder of
ours, so it is no path itself: anything else than letters, digits, `_`, `-` and `.` is refused before it is used.
"""

from __future__ import annotations

import hashlib
import re
import reprlib
from pathlib import Path
from typing import Any

from tinyllama.errors import UserError

MOST = 200  # characters; with our prefixes and suffixes a file name stays below the 255 bytes of common file systems
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
SHOWN = 80  # characters of a value in a message
STEM = 150  # characters of a task's name in the name of a file


def short(value: Any) -> str:
    """A value for a message, cut where it is long; also of a structure that is deep or holds itself."""
    shape = reprlib.Repr()
    shape.maxlevel, shape.maxdict, shape.maxlist, shape.maxstring, shape.maxother = 3, 3, 4, SHOWN, SHOWN
    text = shape.repr(value)
    return text if len(text) <= 2 * SHOWN else f"{text[: 2 * SHOWN]}..."


def checked(name: Any, what: str) -> str:
    """The name, if it is one; UserError beginning with `what` (as in "mine.yaml: name") if not."""
    if not isinstance(name, str):
        raise UserError(f"{what} {short(name)} is not text", fix="put it in quotes")
    if len(name) > MOST:
        raise UserError(f"{what} {short(name)} has {len(name)} characters", fix=f"use at most {MOST}")
    if not NAME.fullmatch(name):
        raise UserError(f"{what} {short(name)}", fix="use letters, digits, _, - and ., and no . at the beginning")
    return name


def under(folder: Path, name: str, suffix: str = "") -> Path:
    """The file or folder of that name directly in a folder of ours; UserError for what is no name, or for a link."""
    path = folder / f"{checked(name, 'name')}{suffix}"
    if path.is_symlink():
        raise UserError(f"{path} is a link", fix="remove it")
    return path


def stem(task: str) -> str:
    """A part of a file name for one of lm-eval's tasks, whose names may hold parentheses and, behind ours, be long."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", task)
    if plain == task and len(task) <= STEM:
        return task
    return f"{plain[:STEM]}-{hashlib.sha256(task.encode()).hexdigest()[:12]}"


def same(first: str, second: str) -> bool:
    """Whether two names would be one file somewhere: not every file system tells capitals from small letters."""
    return first.casefold() == second.casefold()
