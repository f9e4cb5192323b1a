"""Holds a program that a test starts at a moment that the test names: an import, or the touch of a file.

For tests of signals and kills, which must come at that moment and not some milliseconds later.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from conftest import ROOT, until

# Runs first in each Python of the program; who: "command", "launcher" (DeepSpeed's), "rank N", "worker" (of a pool).
HOOK = """
import os, sys, time

def hook():
    who, event, text, left = os.environ["HOLD"].split("|")
    role = f"rank {os.environ['RANK']}" if "RANK" in os.environ else "command"
    if "deepspeed.launcher.launch" in sys.orig_argv and role == "command":
        role = "launcher"
    if "multiprocessing.spawn" in str(sys.orig_argv):
        role = "worker"
    if role != who:
        return
    left = int(left)

    def at(name, arguments):
        nonlocal left
        if left and name == event and any(text in str(argument) for argument in arguments):
            left -= 1
            if not left:
                open(os.environ["HELD"], "w").close()
                while not os.path.exists(os.environ["HELD"] + ".go-on"):
                    time.sleep(0.02)

    sys.addaudithook(at)

hook()
"""


class Hold:
    """where: who|event|text, of Python's audit events; the number-th such event is waited in until `go_on`."""

    def __init__(self, folder: Path, where: str, number: int = 1) -> None:
        hooks = folder / "hooks"
        hooks.mkdir(exist_ok=True)
        (hooks / "sitecustomize.py").write_text(HOOK)
        self._held, self._folder = folder / "held", folder
        path = os.pathsep.join(filter(None, (str(hooks), str(ROOT), os.environ.get("PYTHONPATH"))))
        self.environment = {"PYTHONPATH": path, "HOLD": f"{where}|{number}", "HELD": str(self._held)}

    def wait(self, process: subprocess.Popen, seconds: float = 240) -> None:
        """Until the program waits."""
        assert until(lambda: self._held.exists() or process.poll() is not None, seconds)
        assert process.poll() is None, process.communicate()

    def go_on(self) -> None:
        (self._folder / "held.go-on").touch()
