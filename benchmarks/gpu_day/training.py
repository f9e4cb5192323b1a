"""Stage 4: `tinyllama train` of the 1.1B recipe until a SIGTERM, which must leave a checkpoint and exit with 75.

Part "resume" of stage 6 goes on from that checkpoint, whose proof (`train/proof.py`) must hold, for one logged step.
"""

from __future__ import annotations

import re
import shutil
import statistics
import time
from typing import Any

from gpu_day.runs import Run, RunError, steps_of, train_command
from gpu_day.sizes import Around, around
from tinyllama import checkpoint

STOPPED_BY_SIGNAL = 75
END_RESERVE_S = 3.0


def folder_of(here: Around) -> Any:
    """The run that stages 4, 5 and 6 share."""
    return here.work / "runs" / f"1.1b-{here.sizes.name}"


def command_of(here: Around, *more: str) -> list[str]:
    settings = [*here.sizes.train_settings, "checkpoint.keep_last=1", *more]
    return train_command(here, "tinyllama_1.1b", folder_of(here), settings)


def half_of_what_did_not_fit(printed: str) -> list[str]:
    """The setting to try again with, where a run ended because its micro-batch was too large for the memory."""
    found = re.search(r"out of memory at micro (\d+) ", printed)
    return [f"training.micro_batch_sequences={int(found[1]) // 2}"] if found and int(found[1]) > 1 else []


def check_disk(here: Around, checkpoints: int) -> None:
    """A checkpoint is 12 bytes a parameter; a full disk would only be met after the training."""
    needed = checkpoints * 12 * here.sizes.model.num_parameters * 1.1
    free = shutil.disk_usage(here.work).free
    if free < needed:
        raise RunError(f"{here.work} has {free / 1e9:.0f} GB free, {checkpoints} checkpoints need {needed / 1e9:.0f}")


def figures(here: Around, run: Run, steps: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Of the steps after the first logged one, in which everything is compiled."""
    later = steps[1:] or steps
    rate = statistics.median(line["tokens_per_s"] for line in later)
    flops = here.sizes.model.flops_per_token(here.sizes.sequence_length)
    values = {
        "tokens_per_s": rate,
        "flops_per_s": rate * flops,
        "flops_per_token": flops,
        "steps": [line["step"] for line in steps],
        "losses": [line["loss"] for line in steps],
        "grad_norms": [line["grad_norm"] for line in steps],
        "step_s": [line["step_time_s"] for line in steps],
        "peak_bytes": steps[-1]["peak_memory_bytes"],
        "start_s": run.first_logged_s,
        "printed": run.printed(),
    }
    memory = values["peak_bytes"] / 2**30
    losses = f"loss {steps[0]['loss']:.3f} to {steps[-1]['loss']:.3f} in {steps[-1]['step']} steps"
    return f"{rate:,.0f} tokens/s, {memory:.1f} GiB, {losses}", values


def train(here: Around) -> None:
    """Start, train, stop by a signal."""
    folder, kept = folder_of(here), here.sizes.save_s
    shutil.rmtree(folder, ignore_errors=True)
    started: list[Run] = []

    def first(*more: str) -> tuple[str, dict[str, Any]]:
        check_disk(here, 1)
        run = Run(command_of(here, *more), folder)
        started.append(run)
        run.until_step(1, here.left_s() - kept)
        run.first_logged_s = time.monotonic() - run.began
        run.until_step(here.sizes.train_steps, here.left_s() - kept)
        if not (steps := steps_of(folder)):
            raise RunError(f"no step was logged in {time.monotonic() - run.began:.0f} s\n{run.printed()}")
        return figures(here, run, steps)

    def stop() -> tuple[str, dict[str, Any]]:
        run, signalled = started[-1], time.monotonic()
        run.terminate()
        run.wait(here.left_s() - END_RESERVE_S, STOPPED_BY_SIGNAL)
        seconds = time.monotonic() - signalled
        found = checkpoint.list_checkpoints(folder)
        if len(found) != 1:
            raise RunError(f"{len(found)} checkpoints after the signal, expected 1\n{run.printed()}")
        step, directory = found[0]
        size = sum(path.stat().st_size for path in directory.iterdir())
        values = {"exit_code": STOPPED_BY_SIGNAL, "step": step, "bytes": size, "seconds_from_signal": seconds}
        return f"exit 75 after {seconds:.1f} s, step {step}, {size / 1e9:.1f} GB", values

    row = "1.1B, ZeRO-3, tinyllama train"
    done = here.rows.measure(row, first)
    if done is None and started and (smaller := half_of_what_did_not_fit(started[-1].printed())):
        done = here.rows.measure(f"{row}, {smaller[0]}", lambda: first(*smaller))
    if done is not None:
        here.rows.measure("1.1B, stopped by SIGTERM", stop)
    if started and started[-1].process.poll() is None:
        started[-1].kill()


def resume(here: Around) -> None:
    """From the checkpoint to the next logged step; then it is killed, as nothing more is to be learnt."""
    folder = folder_of(here)

    def only() -> tuple[str, dict[str, Any]]:
        if not checkpoint.list_checkpoints(folder):
            raise RunError(f"{folder} has no checkpoint: stage 4 has to be run first")
        before = checkpoint.list_checkpoints(folder)[-1][0]
        run = Run(command_of(here), folder)
        try:
            step = run.until_step(before + 1, here.left_s() - END_RESERVE_S)
        finally:
            run.kill()
        printed = run.printed()
        if step <= before or "resumed" not in printed:
            raise RunError(f"no step after {before} in {time.monotonic() - run.began:.0f} s\n{printed}")
        seconds = time.monotonic() - run.began
        values = {"from_step": before, "step": step, "loss": steps_of(folder)[-1]["loss"], "printed": printed}
        return f"step {before} to {step} in {seconds:.0f} s, proof held", values

    here.rows.measure("1.1B, resumed with its proof", only)


def main() -> None:
    here = around()
    {"train": train, "resume": resume}[here.part](here)


if __name__ == "__main__":
    main()
