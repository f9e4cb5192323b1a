"""A corpus that is always there: the prose and the code that CPython ships.

Prose: the documentation topics of `pydoc` and the docstrings of the standard library. Code: its sources. Written as
two `.jsonl` files, with no network. `tinyllama demo` trains on it.
"""

from __future__ import annotations

import ast
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tinyllama.data.durable import cannot_write, durable

SKIPPED_FOLDERS = {"site-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "ensurepip"}


def source_files() -> list[Path]:
    """The standard library's `.py` files, sorted; its test suites, and what is not UTF-8, left out."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        found += [Path(folder) / name for name in sorted(names) if name.endswith(".py")]
    return found


def code() -> Iterator[dict[str, str]]:
    """One record for each source file: `content`, and `path` relative to the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in source_files():
        try:
            content = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue  # a handful of files declare another encoding
        if content.strip():
            yield {"content": content, "path": path.relative_to(root).as_posix()}


def prose() -> Iterator[dict[str, str]]:
    """One record for each documentation topic, and one for each module's docstrings: `text` and `source`."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield {"text": text, "source": f"topic {name}"}
    for record in code():
        try:
            tree = ast.parse(record["content"])
        except SyntaxError:
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
        text = "\n\n".join(doc for doc in found if doc)
        if len(text) >= 200:  # a line or two is no document
            yield {"text": text, "source": record["path"]}


def write(directory: Path) -> dict[str, dict[str, int]]:
    """Write `prose.jsonl` and `code.jsonl` into `directory`, each atomically. Returns documents and bytes of each.

    DataError if it cannot be written.
    """
    counts = {}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, records in (("prose", prose()), ("code", code())):
            target = directory / f"{name}.jsonl"
            documents = 0
            with durable(target) as stream:
                for record in records:
                    stream.write(json.dumps(record, ensure_ascii=False) + "\n")
                    documents += 1
            counts[name] = {"documents": documents, "bytes": target.stat().st_size}
    except OSError as error:
        raise cannot_write(error, directory) from None
    return counts
