"""Scores that lie in a results.json already: kept where they hold, never lost unasked."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from evalsuite import earlier_results
from tinyllama.errors import UserError

FOUND: dict[str, Any] = {
    "format": earlier_results.FORMAT, "model": "runs/a", "content_sha256": "a", "backend": "native", "protocol": "harness",
    "settings": {"limit": None, "copies": 1}, "versions": {"torch": "2.13.0"},
    "tasks": {"piqa": {"key": "1", "value": 0.5}, "boolq": {"key": "2", "value": 0.6, "clean": {}}},
}  # fmt: skip


def changed(**more: Any) -> dict[str, Any]:
    return {**copy.deepcopy(FOUND), **more}


def after(new: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    """What is kept for the new file, if none of the rest may be lost."""
    new["tasks"] = earlier_results.kept(FOUND, new, keys)
    earlier_results.refuse_to_lose(Path("results.json"), FOUND, new)
    return new["tasks"]


def test_what_holds_is_kept():
    assert after(changed(), {"boolq": "2"}) == {"boolq": {"key": "2", "value": 0.6}, "piqa": FOUND["tasks"]["piqa"]}
    assert after(changed(settings={"limit": None, "copies": 2}, model="elsewhere"), {"piqa": "1"}).keys() == {
        "piqa",
        "boolq",
    }
    # Another definition of what is asked for: it is scored anew.
    assert after(changed(), {"piqa": "other"}).keys() == {"boolq"}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"content_sha256": "b"}, "another model, runs/a"),
        ({"settings": {"limit": 10, "copies": 1}}, "limit None, not 10"),
        ({"backend": "hf"}, "backend 'native', not 'hf'"),
        ({"versions": {"torch": "2.14.0"}}, "torch '2.13.0', not '2.14.0'"),
    ],
)
def test_scores_of_something_else_are_not_lost(more: dict[str, Any], words: str):
    with pytest.raises(UserError) as refused:
        after(changed(**more), {"piqa": "other"})
    assert refused.value.what == f"results.json has scores (piqa, boolq) of {words}"


@pytest.mark.parametrize("name", ["tasks", "settings", "versions"])
@pytest.mark.parametrize("value", [5, [], None])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, value: Any):
    (tmp_path / "results.json").write_text(json.dumps({**FOUND, name: value}))
    with pytest.raises(UserError, match=r"results\.json is damaged"):
        earlier_results.read(tmp_path / "results.json")
