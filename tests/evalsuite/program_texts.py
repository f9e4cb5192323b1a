"""The programs of the sandbox's tests, from `programs/*.txt`: each begins with a line `#### NAME`."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).with_name("programs")
ODD = {
    "empty": "",
    "null byte": "x = 1\0",
    "lone surrogate": "x = '\ud800'",
    "windows line ends": "def f():\r\n    return 1\r\nassert f() == 1\r\n",
}


def load(name: str) -> dict[str, str]:
    """Name -> text of the programs in one file."""
    parts = (FOLDER / f"{name}.txt").read_text(encoding="utf-8").split("#### ")[1:]
    found = {part.partition("\n")[0]: part.partition("\n")[2][:-1] for part in parts}
    assert len(found) == len(parts)
    return found


def honest() -> dict[str, str]:
    """Programs that harm nothing, some of which fail: whatever Python's exec says of them is right."""
    return ODD | load("honest")
