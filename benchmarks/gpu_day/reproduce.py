"""Stage 3: a 120M run of 20 steps, and its second half again from the checkpoint between; are they the same bit for bit?

Part "default" reports what is so; part "deterministic" (`training.deterministic`) must be equal, losses and checksums.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from gpu_day.rows import FAILED, OK
from gpu_day.runs import Run, steps_of, train_command
from gpu_day.sizes import Around, around
from tinyllama import checkpoint

END_RESERVE_S = 3.0


def settings_of(here: Around) -> list[str]:
    """Two checkpoints: in the middle and at the end."""
    sizes = here.sizes
    found = [*sizes.reproduce_settings, "training.log_every_steps=1", "checkpoint.keep_last=2"]
    found.append(f"checkpoint.every_steps={sizes.reproduce_steps // 2}")
    if here.part == "deterministic":
        found.append("training.deterministic=true")
    return found


def once(here: Around, folder: Path) -> tuple[str, dict[str, Any]]:
    """A run from its start or its checkpoint to its end: how long, which losses, the checksum of weights and moments."""
    run = Run(train_command(here, "tinyllama_120m", folder, settings_of(here)), folder)
    seconds = run.wait(here.left_s() - END_RESERVE_S, 0)
    steps = steps_of(folder)
    _, last = checkpoint.list_checkpoints(folder)[-1]
    files = json.loads((last / "manifest.json").read_text())["files"]
    values = {
        "steps": [line["step"] for line in steps],
        "losses": [line["loss"] for line in steps],
        "grad_norms": [line["grad_norm"] for line in steps],
        "tokens_per_s": [line["tokens_per_s"] for line in steps],
        "peak_bytes": steps[-1]["peak_memory_bytes"],
        "checksum": files["shard-00000.safetensors"]["sha256"],
    }
    return f"{seconds:.1f} s, loss {steps[0]['loss']:.4f} to {steps[-1]['loss']:.4f}", values


def half_of(whole: Path, folder: Path) -> None:
    """A run directory as it was when the checkpoint in the middle was the newest."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _, middle = checkpoint.list_checkpoints(whole)[0]
    shutil.copytree(middle, folder / "checkpoints" / middle.name)
    shutil.copy(whole / "metrics.jsonl", folder / "metrics.jsonl")  # the resumed run drops the lines after its step


def compared(here: Around, whole: dict[str, Any], resumed: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Losses of the steps that both did, and the checksums of the last checkpoints."""
    first = dict(zip(whole["steps"], whole["losses"], strict=True))
    again = dict(zip(resumed["steps"], resumed["losses"], strict=True))
    middle = here.sizes.reproduce_steps // 2
    both = [step for step in first if step in again and step > middle]
    apart = max((abs(first[step] - again[step]) for step in both), default=float("nan"))
    equal = whole["checksum"] == resumed["checksum"]
    done = len(both) == here.sizes.reproduce_steps - middle
    must = here.part == "deterministic"
    good = done and (not must or (equal and apart == 0))
    figure = f"losses {'equal' if apart == 0 else f'differ by {apart:.2e}'}, checksums {'equal' if equal else 'differ'}"
    values = {"largest_loss_difference": apart, "checksums_equal": equal, "steps_compared": len(both), "must": must}
    return figure, {**values, "status": OK if good else FAILED}


def main() -> None:
    here = around()
    folder = here.work / "runs" / f"120m-{here.part}"
    again = folder.with_name(f"{folder.name}-resumed")
    for old in (folder, again):
        shutil.rmtree(old, ignore_errors=True)
    name = "120M, " + here.part
    whole = here.rows.measure(f"{name}, {here.sizes.reproduce_steps} steps", lambda: once(here, folder))
    if whole is None:
        return
    half_of(folder, again)
    resumed = here.rows.measure(f"{name}, resumed in the middle", lambda: once(here, again))
    if resumed is not None:
        here.rows.measure(f"{name}, resumed against whole", lambda: compared(here, whole, resumed))
    for old in (folder, again):
        shutil.rmtree(old, ignore_errors=True)  # a gigabyte and more a checkpoint


if __name__ == "__main__":
    main()
