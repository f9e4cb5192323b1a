"""What an evaluation writes: each file under its name only when it is whole, and one clear line when the disk is full."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tinyllama.data.durable import write_text


def plain(item: Any) -> Any:
    """The same with numpy's numbers as Python's, and None for what is not a finite number."""
    if isinstance(item, dict):
        return {str(k): plain(v) for k, v in item.items()}
    if isinstance(item, list | tuple):
        return [plain(v) for v in item]
    if hasattr(item, "item") and getattr(item, "ndim", 1) == 0:
        item = item.item()
    if isinstance(item, float) and not math.isfinite(item):
        return None
    return item


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; what JSON does not know becomes text."""
    write_text(path, [json.dumps(plain(value), indent=2, ensure_ascii=False, default=str) + "\n"])


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a row to each line, atomically."""
    write_text(path, (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
