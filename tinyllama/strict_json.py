"""JSON that people write, or that a disk may have damaged, as objects: what has two readings is refused.

Python's own reader takes the last of two equal keys, and NaN and Infinity, which JSON does not have. Here both are errors,
as are numbers beyond a double and nesting without end. A byte order mark, as some editors write, is ignored.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tinyllama.errors import ConfigError, UserError


def parse(text: str | bytes) -> Any:
    """The value in `text` (UTF-8). ValueError says what is wrong, in one line."""
    try:
        return json.loads(
            text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff"),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_float,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None


def read_object(path: Path, what: str, *, missing: str, error: type[UserError] = ConfigError) -> dict[str, Any]:
    """The JSON object in a file; `error` in one line. what: "recipe"; missing: the fix where there is no such file."""
    try:
        value = parse(path.read_bytes())
    except FileNotFoundError:
        raise error(f"{what} {path} does not exist", fix=missing) from None
    except OSError as reason:
        raise error(f"{what} {path} cannot be read ({reason.strerror})", fix="give a readable file") from None
    except ValueError as reason:
        raise error(f"{what} {path} is not JSON ({reason})", fix="correct the file") from None
    if not isinstance(value, dict):
        raise error(f"{what} {path} is not a JSON object but {kind(value)}", fix="correct the file")
    return value


def kind(value: Any) -> str:
    """What a JSON value is, for messages."""
    if isinstance(value, list | tuple):
        return "a list"
    names: dict[type, str] = {dict: "an object", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} is given twice")
        found[key] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value
