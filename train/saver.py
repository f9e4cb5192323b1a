"""Writes checkpoints behind the training: the step waits for a copy in host memory, a thread of each rank does the rest.

The threads of the ranks never communicate over the network, where they would meet the training's own traffic. They hand
over by files in the partial folder: each writes its shard and its generators, then `written-<rank>.json`; rank 0 waits
for all of those, adds state and manifest, and renames the folder, which makes it a checkpoint. The next save, the end of
the run and a signal wait for the last save. What goes wrong in a thread is raised by `check` or `wait`, on every rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama import checkpoint
from tinyllama.data.store import file_sha256
from tinyllama.errors import CheckpointError
from train import generators
from train import state as saved
from train.host_buffers import HostBuffers
from train.proof import add_sums, parameter_sums

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import Tensor

    from train.recipe import CheckpointConfig


PARTIAL, REPLACED = "partial-", "partial-replaced-"


class SaveError(Exception):
    """A checkpoint could not be written; those before it stand. `here`: by this rank."""

    def __init__(self, text: str, here: bool) -> None:
        super().__init__(text)
        self.here = here


def clear_partial(run: Path) -> None:
    """Remove what saves that were killed have left. Only where no other process writes this run.

    A checkpoint that was being replaced when its run was killed gets its name back: the new one if whole, else the old.
    """
    folder = run / "checkpoints"
    for old in folder.glob(f"{REPLACED}step-*"):
        final = folder / old.name.removeprefix(REPLACED)
        new = folder / f"{PARTIAL}{final.name}"
        if not final.exists():
            with contextlib.suppress(CheckpointError):
                checkpoint.verify(new)
                old = new
            os.replace(old, final)
    for left in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(left, ignore_errors=True)


def checkpoints_to_come(config: CheckpointConfig, step: int, total_steps: int, existing: int) -> int:
    """How many more checkpoints a run will have on the disk at once than the `existing` ones, from `step` on.

    One more than are kept: the oldest is removed once the newest is whole.
    """
    saves = [
        *range((step // config.every_steps + 1) * config.every_steps, total_steps, config.every_steps),
        total_steps,
    ]
    every = config.keep_every_steps
    kept_for_good = sum(1 for save in saves[: -config.keep_last] if every and save % every == 0)
    at_once = min(config.keep_last + 1, existing + len(saves)) + kept_for_good
    return max(0, at_once - existing)


class Saver:
    """The checkpoints of one run. `save` and `wait` are collective over `control`, a group apart from the training's."""

    def __init__(
        self, run: Path, config: CheckpointConfig, tokenizer: Path | None, control: Any, beat: Callable[[str], None]
    ) -> None:
        import torch.distributed as dist

        self.run, self.config, self.tokenizer = run, config, tokenizer
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self._control, self._beat = control, beat
        self._buffers = HostBuffers()
        self._thread: threading.Thread | None = None
        self._written, self._abandoned = threading.Event(), threading.Event()
        self._partial = run
        self._bytes = 0  # a sign of life for `wait`
        self._error: BaseException | None = None
        self._finished: dict[str, Any] | None = None

    def shortage(self, num_parameters: int, step: int, total_steps: int) -> str | None:
        """One line if the disk has no room for the checkpoints to come, 12 bytes a parameter each; None if it has."""
        steps = [at for at, _ in checkpoint.list_checkpoints(self.run) if at <= step]
        existing = sum(at % self.config.every_steps == 0 for at in steps)  # the rest makes room for none to come
        count, each = checkpoints_to_come(self.config, step, total_steps, existing), 12 * num_parameters
        free = shutil.disk_usage(self.run).free
        if free >= count * each:
            return None
        return (
            f"{self.run} has {free / 1e9:.1f} GB free, {count} checkpoints of {each / 1e9:.1f} GB may come: a full "
            f"disk ends the run with exit code 74; make room, or lower checkpoint.keep_last={self.config.keep_last}"
        )

    def save(self, engine: DeepSpeedEngine, state: dict[str, Any]) -> Path:
        """Begin the checkpoint of `state["step"]`; returns the folder that it will have once it is valid."""
        import torch.distributed as dist

        began = time.perf_counter()
        self.wait()
        final = self.run / "checkpoints" / checkpoint.step_name(state["step"])
        partial = self._partial = final.with_name(f"{PARTIAL}{final.name}")
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier(group=self._control)
        tensors = {
            f"{kind}|{name}|{start}": tensor.detach().flatten()[: stop - start]
            for name, start, stop, local in saved.local_slices(engine)
            for kind, tensor in local.items()
        }
        if self.config.background:
            tensors = self._buffers.copy(tensors)
        # The training goes on changing what the state refers to.
        state = json.loads(json.dumps({**state, "ranks": self.ranks}))
        random_state = generators.read_state()
        self._written.clear()
        self._abandoned.clear()
        self._error = None
        copied = time.perf_counter() - began

        def work() -> None:
            try:
                self._write(partial, tensors, random_state)
                self._written.set()
                if self.rank == 0:
                    self._finish(partial, final, state)
                seconds = time.perf_counter() - began
                stall = copied if self.config.background else seconds
                self._finished = {"step": state["step"], "save_stall_s": stall, "save_s": seconds}
            except BaseException as error:
                self._error = error
            finally:
                self._written.set()

        self._thread = threading.Thread(target=work, name="saver", daemon=True)
        self._thread.start()
        if not self.config.background:
            self.wait()
        return final

    @property
    def failed(self) -> bool:
        """Whether this rank's thread has met an error; the loop tells the others, and all call `wait`."""
        return self._error is not None

    def take_finished(self) -> dict[str, Any] | None:
        """Step, `save_stall_s` and `save_s` of a save that has ended since the last call."""
        finished, self._finished = self._finished, None
        return finished

    def wait(self) -> None:
        """Until the save under way is valid. SaveError on every rank if it failed on any."""
        if self._thread is None:
            return
        self._until(self._written.is_set)
        self._agree()  # before rank 0 waits for files that will never come
        self._until(lambda: self._thread is None or not self._thread.is_alive())
        self._agree()
        self._thread = None

    def close(self) -> None:
        """Give back the host memory of the copies; every save must have ended."""
        self._buffers.close()

    def _until(self, done: Callable[[], bool]) -> None:
        seen = -1
        while not done():
            if self._bytes != seen:  # a disk that hangs is a hang
                seen = self._bytes
                self._beat("wait for the save")
            time.sleep(0.005)

    def _agree(self) -> None:
        """Whether all is well so far, on every rank; one rank alone tells what is not."""
        import torch
        import torch.distributed as dist

        first = torch.tensor([self.rank if self.failed else self.ranks], dtype=torch.int32)
        dist.all_reduce(first, op=dist.ReduceOp.MIN, group=self._control)
        if first.item() == self.ranks:
            return
        error, partial = self._error, self._partial
        self._abandoned.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        dist.barrier(group=self._control)
        if self.rank == 0:  # what is not a checkpoint must not keep the disk full
            shutil.rmtree(partial, ignore_errors=True)
        raise SaveError(f"{partial}: could not be written: {error}", here=first.item() == self.rank) from error

    def _write(self, partial: Path, tensors: dict[str, Tensor], random_state: dict[str, Any]) -> None:
        """This rank's files, and last of all the one that says that they are complete."""

        def report(count: int) -> None:
            self._bytes += count

        shard = partial / f"shard-{self.rank:05d}.safetensors"
        digest = checkpoint.write_safetensors(shard, tensors, report)
        files = {shard.name: {"bytes": shard.stat().st_size, "sha256": digest}}
        files |= _write_json(partial / generators.file_name(self.rank), random_state)
        entry = {"files": files, "sums": parameter_sums(tensors, report) if self.config.proof else {}}
        name = partial / f"written-{self.rank:05d}.json"
        _write_json(name.with_suffix(".partial"), entry)
        os.replace(name.with_suffix(".partial"), name)

    def _finish(self, partial: Path, final: Path, state: dict[str, Any]) -> None:
        """Rank 0: collect what all ranks wrote, add state and manifest, and rename."""
        files: dict[str, Any] = {}
        sums = []
        for rank in range(self.ranks):
            entry = partial / f"written-{rank:05d}.json"
            while not entry.exists():
                if self._abandoned.wait(0.005):
                    raise _AbandonedError
            found = json.loads(entry.read_text())
            files |= found["files"]
            sums.append(found["sums"])
            entry.unlink()
        if self.config.proof:
            state["proof"]["sums"] = add_sums(sums)
        files |= _write_json(partial / "state.json", state)
        if self.tokenizer is not None:
            copy = partial / "tokenizer.model"
            shutil.copyfile(self.tokenizer, copy)
            files[copy.name] = {"bytes": copy.stat().st_size, "sha256": file_sha256(copy)}
        _write(partial / "manifest.json", checkpoint.manifest_text(files))
        _rename(partial, final)
        self._prune(state["step"])

    def _prune(self, saved: int) -> None:
        """Remove what is no longer kept of the checkpoints up to the one just saved.

        Kept are the newest of the schedule, for a rewind goes to these, and the newest of the steps between: a signal's,
        or the end of a shorter run. Those of later steps are damaged, or of a course that was left; the run replaces them
        as it comes to them.
        """
        steps = [step for step, _ in checkpoint.list_checkpoints(self.run) if step <= saved]
        kept = set(kept_steps(steps, self.config))
        for step, old in checkpoint.list_checkpoints(self.run):
            if step <= saved and step not in kept:
                # A folder that loses its final name first is never half of a checkpoint.
                doomed = old.with_name(f"{PARTIAL}{old.name}")
                os.replace(old, doomed)
                _remove(doomed)


def kept_steps(steps: list[int], config: CheckpointConfig) -> list[int]:
    """Which checkpoints of `steps`, ascending, are kept once the last of them is whole: keep_last, at most one more,
    and those of keep_every_steps."""
    scheduled = [step for step in steps if step % config.every_steps == 0][-config.keep_last :]
    between = [step for step in steps if step % config.every_steps and step > min(scheduled, default=0)][-1:]
    kept = {*scheduled, *between}
    others = [step for step in steps if step not in kept]
    while others and len(kept) < config.keep_last:
        kept.add(others.pop())
    every = config.keep_every_steps
    return [step for step in steps if step in kept or (every and step % every == 0)]


class _AbandonedError(Exception):
    """Another rank failed while rank 0 waited for its files."""


def _write_json(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write and fsync; returns the manifest's entry of the file."""
    return _write(path, json.dumps(content, indent=1) + "\n")


def _write(path: Path, text: str) -> dict[str, Any]:
    with open(path, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    return {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}}


def _rename(partial: Path, final: Path) -> None:
    replaced = final.with_name(f"{REPLACED}{final.name}")
    _remove(replaced)
    if os.path.lexists(final):  # the same step again, after a resume from an older checkpoint
        os.replace(final, replaced)
    os.replace(partial, final)
    _remove(replaced)
    folder = os.open(final.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _remove(path: Path) -> None:
    """A folder and all in it; or what stands in its place, if anything does."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
