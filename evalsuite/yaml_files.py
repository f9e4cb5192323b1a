"""Reads YAML files of the user's own, a suite's or a task's, with every mistake told in one line.

A file must be a regular file of UTF-8 text, small, without Python tags, repeated keys, or aliases that hold themselves or
unfold to very much. `!function` is text here; lm-eval resolves it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evalsuite.names import short
from tinyllama.errors import UserError

MOST_BYTES = 4 << 20
MOST_NODES = 200_000
DEPTH = 100
FIX = "see docs/evaluation.md"


class Function(str):
    """A `!function` of a YAML file: the dotted name of what is called."""


def refuse_unreadable(path: Path, where: str = "", fix: str | None = None) -> None:
    """UserError, beginning with `where`, unless this is a regular file that can be opened: no folder, pipe or device."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
            raise UserError(f"{where}{path} is {kind}", fix=fix or "give a file")
        with open(path, "rb"):
            pass
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{where}{path} cannot be read ({reason})", fix=fix or "give a file") from None


def mapping(path: Path, what: str, where: str = "") -> dict[str, Any]:
    """The content of a `what`'s YAML file; UserError beginning with `where`, if it is named there."""
    import yaml

    text = _text(path, what, where)
    try:
        found = yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        reason = " ".join(str(getattr(error, "problem", None) or error).split())[:200]
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{where}{path}{line} is not YAML ({reason})", fix=FIX) from None
    except RecursionError:
        raise UserError(f"{where}{path} is nested too deeply", fix=FIX) from None
    except ValueError as error:  # a date or a number that is none
        raise UserError(f"{where}{path} is not YAML ({error})", fix="put the value in quotes") from None
    if not isinstance(found, dict):
        raise UserError(f"{where}{path} holds no mapping", fix=f"a {what}'s file has keys: {FIX}")
    for key in found:
        if not isinstance(key, str):
            raise UserError(f"{where}{path}: key {key!r} is not text", fix="put it in quotes")
    _refuse_bomb(found, f"{where}{path}")
    return found


def _text(path: Path, what: str, where: str) -> str:
    refuse_unreadable(path, where, f"give a {what}'s YAML file")
    with open(path, "rb") as stream:
        content = stream.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise UserError(f"{where}{path} has more than {MOST_BYTES >> 20} MiB", fix=f"give a {what}'s YAML file")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{where}{path}:{line} is not UTF-8 (byte 0x{content[error.start]:02x})", fix="save it as UTF-8"
        ) from None


def _loader() -> Any:
    """YAML, with lm-eval's `!function` as a `Function` and without repeated keys."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in seen:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"key {key.value!r} is there twice", key.start_mark
                        )
                    seen.add(key.value)
            return super().construct_mapping(node, deep=deep)

    Loader.add_constructor("!function", lambda loader, node: Function(loader.construct_scalar(node)))
    return Loader


def _refuse_bomb(found: Any, where: str) -> None:
    """UserError for what holds itself, or is more than MOST_NODES values once its aliases are written out."""
    left = MOST_NODES

    def walk(value: Any, depth: int) -> None:
        nonlocal left
        left -= 1
        if left < 0 or depth > DEPTH:
            raise UserError(f"{where}: its aliases unfold to very much", fix="write the values out")
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(key, depth + 1)
                walk(inner, depth + 1)
        elif isinstance(value, list | tuple | set):
            for inner in value:
                walk(inner, depth + 1)

    walk(found, 0)


def task(path: Path, where: str = "") -> tuple[dict[str, Any], list[Path]]:
    """A task's definition with the files that it includes, as lm-eval joins them, and all of those files.

    UserError, beginning with `where`, for one that cannot be read, that includes itself, or that is none.
    """
    files: list[Path] = []

    def joined(file: Path, place: str, above: tuple[Path, ...]) -> dict[str, Any]:
        resolved = Path(os.path.realpath(file))
        if resolved in above:
            raise UserError(f"{place}{file} includes itself", fix="take that include out")
        own = mapping(file, "task", place)
        if resolved not in files:
            files.append(resolved)
        names = own.pop("include", None)
        found: dict[str, Any] = {}
        for name in names if isinstance(names, list) else [] if names is None else [names]:
            if not isinstance(name, str):
                raise UserError(f"{place}{file}: include {short(name)} is not a file's name", fix=FIX)
            inner = joined(resolved.parent / name, f"{place}{file}: include ", (*above, resolved))
            inner.pop("task_list", None)
            found |= inner
        return found | own

    return joined(path, where, ()), files


def functions(value: Any) -> Iterator[Function]:
    """Those that a task's definition, or a part of it, names."""
    if isinstance(value, Function):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from functions(inner)


def modules(path: Path, folder: Path) -> list[Path]:
    """The Python files in or below a folder that the functions of a task's definition are in."""
    names = {name.rpartition(".")[0] for name in functions(task(path)[0])}
    found = [folder / f"{name.replace('.', '/')}.py" for name in sorted(names) if name]
    return [file for file in found if file.is_file()]
