"""The results.json of an earlier evaluation: what of it still holds, and what a new one must not lose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evalsuite.names import short
from tinyllama.errors import UserError

FORMAT_FAMILY = "tinyllama-results"
FORMAT = f"{FORMAT_FAMILY}-1"


def read(path: Path) -> dict[str, Any]:
    """The results that lie there; nothing where there are none, or where they cannot be continued."""
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "no JSON"
        raise UserError(f"{path} cannot be read ({reason})", fix="give another --output, or remove it") from None
    if not isinstance(old, dict) or not str(old.get("format", "")).startswith(FORMAT_FAMILY):
        raise UserError(f"{path} is not tinyllama eval's", fix="give another --output, or move it away")
    tasks = old.get("tasks", {})
    sections = [tasks, old.get("settings", {}), old.get("versions", {})]
    sections += tasks.values() if isinstance(tasks, dict) else []
    if not all(isinstance(section, dict) for section in sections):
        raise UserError(f"{path} is damaged", fix="give another --output, or remove it")
    return old if old["format"] == FORMAT else {}


def what_decides(results: dict[str, Any]) -> dict[str, Any]:
    """What two files have in common if one may take scores from the other: the model and how it is computed."""
    settings = {k: v for k, v in results.get("settings", {}).items() if k != "copies"}
    other = {k: results.get(k) for k in ("content_sha256", "backend", "protocol")}
    return {**settings, **results.get("versions", {}), **other}


def kept(before: dict[str, Any], found: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    """Finished benchmarks of the file before this one that still hold: those asked for now by their keys, others where all
    that decides is the same. Clean scores are made anew.
    """
    same = what_decides(before) == what_decides(found)
    kept = {
        name: {k: v for k, v in entry.items() if k != "clean"}
        for name, entry in before.get("tasks", {}).items()
        if (entry.get("key") == keys[name] if name in keys else same)
    }
    return in_order(kept, list(keys))


def refuse_to_lose(path: Path, before: dict[str, Any], found: dict[str, Any]) -> None:
    """UserError if the file has scores of another model, or of other settings, that would not be in it any more."""
    lost = [name for name in before.get("tasks", {}) if name not in found["tasks"]]
    old, new = what_decides(before), what_decides(found)
    if not lost or old == new:
        return
    if old["content_sha256"] != new["content_sha256"]:
        what = f"another model, {before.get('model')}"
    else:
        what = ", ".join(
            f"{name} {short(old.get(name))}, not {short(new.get(name))}"
            for name in {**new, **old}
            if old.get(name) != new.get(name)
        )
    raise UserError(
        f"{path} has scores ({', '.join(lost)}) of {what}",
        fix="give another --output, or --overwrite to replace them",
    )


def in_order(tasks: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """What was asked for, in the order asked; then what else there is."""
    return {name: tasks[name] for name in (*names, *tasks) if name in tasks}
