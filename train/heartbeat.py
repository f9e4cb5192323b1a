"""Signs of life: `RUN/heartbeats/rank-00000.json` says what each rank does, and a watchdog in every rank reads them all.

When no rank of a run has moved for the time allowed, every rank writes the stacks of its threads to
`RUN/stacks/rank-00000.txt` and ends with exit code 76, so that a supervisor can start the run again. One rank that hangs
stops all others at the next exchange; as long as one moves (rank 0 writing to a slow disk) the run is alive. A rank whose
process is gone ends the others in the same way, at once instead of after their network timeouts.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyllama.processes import Owner

HUNG = 76
ENDED = "ended"
BYTES = 512  # of a heartbeat: overwritten in place by one write, without a rename for each phase
INTERVAL_S = 0.5
GRACE_S = 2.0  # for the others to write their stacks, or to end by themselves


def heartbeat_file(run: Path, rank: int) -> Path:
    """Where a rank says what it does."""
    return run / "heartbeats" / f"rank-{rank:05d}.json"


def stack_file(run: Path, rank: int) -> Path:
    """Where a rank writes its stacks."""
    return run / "stacks" / f"rank-{rank:05d}.txt"


def read(run: Path, rank: int, token: str | None = None) -> dict[str, Any]:
    """The last heartbeat of a rank; empty if there is none, or not one of the run that `token` names."""
    try:
        found = json.loads(heartbeat_file(run, rank).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    whole = isinstance(found, dict) and {"rank", "phase", "step", "time"} <= found.keys() and Owner.of(found)
    return found if whole and token in (None, found.get("run")) else {}


def exit_codes(run: Path, token: str) -> list[int]:
    """The exit codes of those ranks of a run that ended by themselves."""
    files = sorted((run / "heartbeats").glob("rank-*.json"))
    beats = [read(run, int(file.stem.removeprefix("rank-")), token) for file in files]
    return [beat["code"] for beat in beats if beat.get("phase") == ENDED]


class Heartbeat:
    """Writes this rank's file: `beat(phase)` costs some microseconds."""

    def __init__(self, run: Path, rank: int) -> None:
        self.run, self.rank, self.step = run, rank, 0
        self.pauses: dict[tuple[str, int], Callable[[], None]] = {}  # by phase and step; see train/injection.py
        self.token = ""
        self._descriptor: int | None = None
        self._fixed: dict[str, Any] = {"rank": rank, **dataclasses.asdict(Owner.this())}

    def start(self, token: str) -> None:
        """Create the file, of the run that `token` names. Before this a beat is nothing."""
        self.token = self._fixed["run"] = token
        path = heartbeat_file(self.run, self.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        stack_file(self.run, self.rank).unlink(missing_ok=True)  # of a run before this one
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self("start")

    def __call__(self, phase: str, **more: Any) -> None:
        if self._descriptor is None:
            return
        text = json.dumps({"phase": phase, "step": self.step, "time": round(time.time(), 3), **self._fixed, **more})
        os.pwrite(self._descriptor, text.ljust(BYTES - 1).encode() + b"\n", 0)
        if self.pauses and (pause := self.pauses.pop((phase, self.step), None)):
            pause()

    def speaks(self) -> bool:
        """Whether this rank tells what went wrong: rank 0, or one that meets it without rank 0."""
        if self.rank == 0:
            return True
        if (
            self._descriptor is None
        ):  # all ranks meet the same mistake, and the launcher ends rank 0 with the first of them
            time.sleep(GRACE_S)
            return False
        time.sleep(GRACE_S / 2)
        return read(self.run, 0, self.token).get("phase") != ENDED

    def end(self, code: int) -> None:
        """The last one: this rank ends by itself."""
        self(ENDED, code=code)


def code_of_a_peer(run: Path, rank: int, ranks: int, token: str) -> int | None:
    """The exit code of another rank that has ended by itself, waiting a little for it; None if none has."""
    deadline = time.monotonic() + GRACE_S
    while True:
        beats = [read(run, other, token) for other in range(ranks) if other != rank]
        codes = [beat["code"] for beat in beats if beat.get("phase") == ENDED and beat["code"] != 0]
        if codes or time.monotonic() > deadline:
            return codes[0] if codes else None
        time.sleep(INTERVAL_S / 5)


class Watchdog:
    """A thread that ends a run that does not move. `limit_s` may be changed while it runs.

    token: of the run; files that another run has left, or writes, are not looked at.
    """

    def __init__(self, run: Path, rank: int, ranks: int, limit_s: float, token: str) -> None:
        self.run, self.rank, self.limit_s, self.token = run, rank, limit_s, token
        self._seen: list[dict[str, Any]] = [{} for _ in range(ranks)]
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def _watch(self) -> None:
        idle_s, last = 0.0, time.monotonic()
        while True:
            time.sleep(INTERVAL_S)
            # A run that was suspended as a whole has not hung: its time is that of this thread.
            idle_s += min(time.monotonic() - last, 2 * INTERVAL_S)
            last = time.monotonic()
            now = [
                (read(self.run, rank, self.token) or seen) if self._is_looked_at(seen, idle_s) else seen
                for rank, seen in enumerate(self._seen)
            ]
            if now != self._seen:
                idle_s, self._seen = 0.0, now
            ended = next((beat for beat in now if beat.get("phase") == ENDED and beat["rank"] != self.rank), None)
            if now[self.rank].get("phase") == ENDED:
                return
            if ended is not None and ended["code"] not in (0, 75):
                # Its reason is the run's; a rank that waits for it would hide that behind a timeout of its own.
                time.sleep(GRACE_S)
                if read(self.run, self.rank, self.token).get("phase") != ENDED:
                    self._dump(f"rank {ended['rank']} has ended with exit code {ended['code']}")
                    os._exit(ended["code"])
            gone = next((beat for beat in now if _is_gone(beat)), None)
            if gone is not None:
                self._end(f"rank {gone['rank']} died in phase {gone['phase']!r} of step {gone['step'] + 1}")
            if idle_s > self.limit_s:
                self._end(f"no rank has moved for {idle_s:.0f} s: {self._behind()}")

    def _is_looked_at(self, seen: dict[str, Any], idle_s: float) -> bool:
        """Other hosts' ranks only when those here stand still: all files for all ranks are too many for a file system."""
        return not seen or _is_here(seen) or idle_s > self.limit_s / 2

    def _behind(self) -> str:
        """Where the ranks stand, the one that has been still for longest first: the others wait for it."""
        order = sorted((beat for beat in self._seen if beat), key=lambda beat: beat["time"])
        return ", ".join(f"rank {beat['rank']} in {beat['phase']!r} of step {beat['step'] + 1}" for beat in order[:4])

    def _end(self, why: str) -> None:
        self._dump(why)
        if self.rank == min((beat["rank"] for beat in self._seen if beat and not _is_gone(beat)), default=self.rank):
            print(f"error: {why}; stacks in {self.run / 'stacks'}", file=sys.stderr, flush=True)
        time.sleep(GRACE_S)
        here = [beat for beat in self._seen if beat and _is_here(beat) and not _is_gone(beat)]
        stuck = [str(beat["pid"]) for beat in here if not stack_file(self.run, beat["rank"]).exists()]
        if stuck:
            # Ranks that could not even write their stacks will not end by themselves, and the launcher waits for them.
            # It must have seen this rank's exit code before theirs, which says only that they were killed.
            kill = f"sleep {GRACE_S}; kill -9 {' '.join(stuck)}"
            subprocess.Popen(["sh", "-c", kill], start_new_session=True, stderr=subprocess.DEVNULL)
        os._exit(HUNG)

    def _dump(self, why: str) -> None:
        path = stack_file(self.run, self.rank)
        path.parent.mkdir(exist_ok=True)
        with open(path, "w") as stream:
            stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {why}\n{json.dumps(self._seen[self.rank])}\n\n")
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)


def _is_here(beat: dict[str, Any]) -> bool:
    """Whether a rank's process can be told, and ended, from here. Machines and containers can share a name."""
    this = Owner.this()
    return (beat["host"], beat["boot"], beat["pids"]) == (this.host, this.boot, this.pids)


def _is_gone(beat: dict[str, Any]) -> bool:
    """Whether a rank of this machine has no process any more, without having ended by itself."""
    if not beat or beat["phase"] == ENDED or not _is_here(beat):
        return False
    owner = Owner.of(beat)
    return owner is not None and owner.is_alive() is False
