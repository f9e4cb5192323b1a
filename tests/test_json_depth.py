"""JSON that is nested without end is as damaged as any other: one line, whatever command was given it."""

from __future__ import annotations

import pytest

from evalsuite.table import load_results
from tinyllama.cli.compare import _kinds
from tinyllama.data.durable import read_json
from tinyllama.data.store import read_manifest
from tinyllama.errors import UserError
from tinyllama.planner.prices import read_object
from tinyllama.report.inputs import kind_of
from tinyllama.report.inputs import read_json as read_of_report


def test_what_is_nested_without_end_is_damaged(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text("[" * 100_000)
    for refuse in (lambda: read_object(path, "--prices"), lambda: read_manifest(tmp_path), lambda: load_results(path)):
        with pytest.raises(UserError, match=r"is not JSON|cannot be read"):
            refuse()
    assert (read_json(path), kind_of(path), read_of_report(path)) == (None, None, {})
    assert _kinds(str(path)) == {"bench", "scores"}
