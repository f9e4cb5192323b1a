"""What the day finds, one JSON object a line in `rows.jsonl`, on the disk the moment it is known.

A row is appended by one write and flushed to the disk, so that a process that is killed leaves every row before it; a line
that was cut is passed over by `read`. A row that begins says so first: whoever ends its process can tell which it was.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

OK, FAILED, SKIPPED, BEGAN = "ok", "failed", "skipped", "began"
MAX_ERROR = 200_000  # characters of one error text


class NeedsGpuError(Exception):
    """A row that the device at hand cannot give."""


class Rows:
    """The rows of one part of a stage. Each is also printed, as one line that begins with `· `."""

    def __init__(self, path: Path, stage: int, part: str) -> None:
        self.path, self.stage, self.part = path, stage, part

    def add(self, row: str, status: str, **more: Any) -> dict[str, Any]:
        """Write a row. more: figure (text for the table), seconds, error, reason, values."""
        entry = {"stage": self.stage, "part": self.part, "row": row, "status": status, **more}
        entry["at"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        if "error" in entry:
            entry["error"] = cut(str(entry["error"]))
        append(self.path, entry)
        if status != BEGAN:
            print(f"· {self.stage} {line_of(entry)}", flush=True)
        return entry

    def measure(self, row: str, work: Callable[[], tuple[str, dict[str, Any]]]) -> dict[str, Any] | None:
        """Write what `work` gives (figure, values), or why it failed, with the whole traceback. None where it failed."""
        self.add(row, BEGAN)
        began = time.perf_counter()
        try:
            figure, values = work()
        except NeedsGpuError as error:
            self.add(row, SKIPPED, reason=str(error), seconds=time.perf_counter() - began)
            return None
        except Exception:
            self.add(row, FAILED, error=traceback.format_exc(), seconds=time.perf_counter() - began)
            return None
        status = values.pop("status", OK)
        self.add(row, status, figure=figure, seconds=time.perf_counter() - began, values=values)
        return values


def cut(text: str) -> str:
    """The text, without its middle where it is longer than a row may hold."""
    if len(text) <= MAX_ERROR:
        return text
    return (
        f"{text[: MAX_ERROR // 2]}\n[... {len(text) - MAX_ERROR:,} characters left out ...]\n{text[-MAX_ERROR // 2 :]}"
    )


def line_of(entry: dict[str, Any]) -> str:
    """A row in one short line."""
    seconds = f" ({entry['seconds']:.1f} s)" if entry.get("seconds") is not None else ""
    said = entry.get("figure") or entry.get("reason") or last_line(entry.get("error") or "")
    return f"{entry['row']}: {entry['status']}{seconds} {said[:160]}".rstrip()


def last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def _clean(value: Any) -> Any:
    """JSON knows no NaN and no infinity: a number that is not one is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(inner) for inner in value]
    return value


def append(path: Path, entry: dict[str, Any]) -> None:
    """Add one line and wait until it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = (json.dumps(_clean(entry), default=str) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a line that a kill cut short
            data = b"\n" + data
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> list[dict[str, Any]]:
    """All rows, in order; lines that were cut are left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and "row" in entry:
            found.append(entry)
    return found


def finished(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that say how they ended."""
    return [entry for entry in rows if entry["status"] != BEGAN]


def unfinished(rows: list[dict[str, Any]], stage: int, part: str) -> list[str]:
    """Names of the rows of a part that began and did not end."""
    mine = [entry for entry in rows if (entry["stage"], entry["part"]) == (stage, part)]
    begun = [entry["row"] for entry in mine if entry["status"] == BEGAN]
    ended = {entry["row"] for entry in finished(mine)}
    return [name for name in begun if name not in ended]
