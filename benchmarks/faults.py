"""A run of two ranks that is killed in every phase, and worse, and must end with the weights of an undisturbed one.

    python benchmarks/faults.py [--short]

One run meets every fault in turn, each some steps after the one before; after each it is started again by the same
command. The ranks wait in the phase that a kill is aimed at until it has struck.
SIGKILL and SIGTERM go to rank 0, rank 1 and both, in each phase of a step and of a save. Then: no room for a file during
a save, a bit flipped in the newest checkpoint, a rank that stands still (SIGSTOP), a loss that is NaN. At the end every
checkpoint that the run wrote is compared with the undisturbed run's of the same step, weights and moments, bit for bit,
and so is every loss.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import record, show

from tinyllama import checkpoint
from train import heartbeat

PHASES = ("data", "forward", "backward", "step", "save", "write")  # the last in the background, while steps go on
STEPS_APART = 4  # two checkpoints from fault to fault
SETTINGS = {
    "model.vocab_size": 600,
    "model.hidden_size": 64,
    "model.intermediate_size": 176,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 4,
    "model.num_key_value_heads": 2,
    "data.sequence_length": 64,
    "data.max_epochs": 1000,
    "training.batch_tokens": 768,
    "training.micro_batch_sequences": 3,
    "optimizer.warmup_steps": 2,
    "validation.every_steps": 1000000,
    "checkpoint.every_steps": 2,
    "checkpoint.keep_last": 1000000,
    "health.hang_timeout_s": 5,
}


@dataclasses.dataclass
class Fault:
    """One disturbance and what came of it."""

    kind: str
    step: int
    ranks: tuple[int, ...] = ()
    phase: str = ""
    met: str = ""  # the phase that the first of the ranks was in
    reached: int = 0  # steps that were done when it ended
    exit_code: int | None = None
    resumed_from: int | None = None
    down_s: float | None = None  # from the fault to the end of the last process

    @property
    def expected(self) -> tuple[int, ...]:
        """Exit codes that are right: of a kill the launcher's own, or that of the rank which noticed it first."""
        special = {"SIGTERM": (75,), "no room": (74,), "SIGSTOP": (76,), "nan": (70,), "corrupt": (75,)}
        return special.get(self.kind, (76, 247, 137, 1))

    @property
    def inject(self) -> list[str]:
        if self.kind == "nan":
            return ["--inject", f"nan@{self.step}"]
        return ["--inject", f"hold={self.phase}@{self.step}"] if self.is_held else []

    @property
    def is_held(self) -> bool:
        """Whether the ranks wait in the phase; a save in the background is met as it is."""
        return self.phase not in ("", "write")


def plan(short: bool, only: list[str] | None) -> list[Fault]:
    """The faults in the order in which they strike. only: of these kinds."""
    kills = [
        ("SIGKILL" if kill else "SIGTERM", ranks, phase)
        for phase in PHASES
        for ranks in ((0,), (1,), (0, 1))
        for kill in (True, False)
    ]
    faults = [("no room", (0, 1), ""), ("no room", (1,), ""), ("corrupt", (0,), ""), ("corrupt", (1,), "")]
    faults += [("SIGSTOP", (0,), ""), ("SIGSTOP", (1,), ""), ("nan", (), "")]
    chosen: list[tuple[str, tuple[int, ...], str]] = [*kills, *faults]
    if short:
        chosen = [("SIGKILL", (1,), "backward"), ("corrupt", (1,), ""), ("nan", (), "")]
    chosen = [fault for fault in chosen if only is None or fault[0] in only]
    # Saves are at even steps: the phase "save" begins at the end of an odd one, as does the write.
    return [
        Fault(kind, STEPS_APART * (n + 1) + (phase in ("save", "write")), ranks, phase)
        for n, (kind, ranks, phase) in enumerate(chosen)
    ]


class Campaign:
    """One data folder, the undisturbed run and the disturbed one."""

    def __init__(self, folder: Path, data: Path, num_steps: int) -> None:
        self.whole, self.run, self.data = folder / "undisturbed", folder / "disturbed", data
        self.settings = {**SETTINGS, "training.tokens": num_steps * SETTINGS["training.batch_tokens"]}

    def start(self, run: Path, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tinyllama", "train", "--recipe", "demo", "--data", str(self.data)]
        command += ["--output", str(run), "--num-accelerators", "2", *more]
        command += [part for key, value in self.settings.items() for part in ("--set", f"{key}={value}")]
        log = open(run.with_suffix(".log"), "a")
        return subprocess.Popen(command, stdout=log, stderr=log, text=True, cwd=Path(__file__).parent.parent)

    def finish(self, run: Path) -> None:
        if (code := self.start(run).wait(timeout=600)) != 0:
            raise RuntimeError(f"exit code {code}: see {run.with_suffix('.log')}")

    def strike(self, fault: Fault) -> None:
        """Start the run, disturb it, and wait for its end."""
        before = len(checkpoint.list_checkpoints(self.run))
        for mark in self.run.glob("held-*"):
            mark.unlink()
        (self.run / "go-on").unlink(missing_ok=True)
        process = self.start(self.run, *fault.inject)
        struck = self._wait_and_hit(fault, process)
        fault.exit_code = process.wait(timeout=120)
        fault.down_s = round(time.monotonic() - struck, 2) if struck else None
        # A signal that is answered ends the run after the step under way.
        fault.reached = max(heartbeat.read(self.run, rank)["step"] for rank in (0, 1)) + (fault.exit_code == 75)
        if fault.kind == "corrupt":
            newest = checkpoint.list_checkpoints(self.run)[-1][1]
            shard = newest / f"shard-{fault.ranks[0]:05d}.safetensors"
            content = bytearray(shard.read_bytes())
            content[len(content) // 2] ^= 1
            shard.write_bytes(content)
        if len(checkpoint.list_checkpoints(self.run)) < before:
            raise RuntimeError(f"{fault} has cost a checkpoint")

    def _wait_and_hit(self, fault: Fault, process: subprocess.Popen[str]) -> float | None:
        """Returns when the fault struck, as the rank was in its phase; None where the run does it to itself."""
        if fault.kind == "nan":
            return None
        partial = self.run / "checkpoints" / f"partial-{checkpoint.step_name(fault.step + 1)}"
        aim = fault.ranks[0]
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"{fault}: the run ended before it, exit code {process.returncode}")
            beat = heartbeat.read(self.run, aim)
            if fault.is_held:
                if all((self.run / f"held-{rank}").exists() for rank in (0, 1)):
                    break
                time.sleep(0.002)
                continue
            live = beat and beat["phase"] != heartbeat.ENDED and Path(f"/proc/{beat['pid']}").exists()
            if live and beat["step"] >= fault.step:
                shard = partial / f"shard-{aim:05d}.safetensors"
                if fault.phase == "write" and not shard.exists() and beat["step"] == fault.step:
                    continue
                if fault.phase in ("", "write", beat["phase"]) or beat["step"] > fault.step:
                    break
        pids = [heartbeat.read(self.run, rank)["pid"] for rank in fault.ranks]
        for pid in pids:
            if fault.kind == "no room":
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
            else:
                os.kill(pid, {"SIGKILL": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}.get(fault.kind, signal.SIGTERM))
        fault.met = "write" if fault.phase == "write" and partial.exists() else beat["phase"]
        (self.run / "go-on").touch()
        return time.monotonic()

    def resumed(self) -> list[int]:
        """The checkpoints that the starts of the disturbed run went on from, in order."""
        found = []
        for line in self.run.with_suffix(".log").read_text().splitlines():
            if line.startswith("resumed from"):
                found.append(int(line.split()[2].rpartition("-")[2]))
        return found

    def compare(self) -> dict[str, Any]:
        """Every checkpoint and every loss of the disturbed run against the undisturbed one's."""
        differing = []
        found = checkpoint.list_checkpoints(self.run)
        for step, folder in found:
            if step % SETTINGS["checkpoint.every_steps"] == 0:
                sums = [
                    checkpoint.read_json(path / "state.json")["proof"]["sums"]
                    for path in (folder, self.whole / "checkpoints" / checkpoint.step_name(step))
                ]
                if sums[0] != sums[1] or not _equal(folder, self.whole / "checkpoints" / checkpoint.step_name(step)):
                    differing.append(step)
        losses = [
            [(e["step"], e["loss"]) for e in map(json.loads, (run / "metrics.jsonl").open()) if "loss" in e]
            for run in (self.run, self.whole)
        ]
        return {
            "checkpoints_compared": len(found),
            "checkpoints_differing": differing,
            "last_step": found[-1][0],
            "losses_compared": len(losses[1]),
            "losses_equal": losses[0] == losses[1],
        }


def _equal(first: Path, second: Path) -> bool:
    """Whether two checkpoints hold the same weights and moments, bit for bit."""
    import torch

    slices = [checkpoint.Slices(folder) for folder in (first, second)]
    for name, tensor in checkpoint.read_weights(first):
        for kind in (checkpoint.WEIGHT, *checkpoint.MOMENTS):
            a, b = (s.read(kind, name, 0, tensor.numel()) for s in slices)
            if not torch.equal(a, b):
                return False
    return True


def prepare(folder: Path) -> Path:
    """Tokenizer and stores of what CPython ships."""

    def tinyllama(*arguments: object) -> None:
        subprocess.run([sys.executable, "-m", "tinyllama", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)

    corpus, tokenizer = folder / "corpus", folder / "tokenizer.model"
    tinyllama("data", "corpus", "--output", corpus)
    for name in ("prose", "code"):  # a part is enough
        lines = (corpus / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (corpus / f"{name}.jsonl").write_text("".join([line for line in lines if len(line) < 20_000][:100]))
    tinyllama("tokenizer", "train", corpus, "--output", tokenizer, "--vocab-size", SETTINGS["model.vocab_size"])
    for name in ("prose", "code"):
        options = ("--tokenizer", tokenizer, "--validation-fraction", "0.1")
        tinyllama("data", "prepare", corpus / f"{name}.jsonl", "--output", folder / "data" / name, *options)
    return folder / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--short", action="store_true", help="three faults")
    parser.add_argument("--only", type=lambda text: text.split(","), help="kinds: SIGKILL,SIGTERM,no room,corrupt,...")
    parser.add_argument("--data", type=Path, help="stores prose and code with 600 pieces (default: made)")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    arguments = parser.parse_args()
    faults = plan(arguments.short, arguments.only)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        data = arguments.data or prepare(Path(folder))
        campaign = Campaign(Path(folder), data, faults[-1].step + 2 * STEPS_APART)
        campaign.finish(campaign.whole)
        began = time.monotonic()
        for number, fault in enumerate(faults, 1):
            campaign.strike(fault)
            print(f"{number}/{len(faults)} {dataclasses.asdict(fault)}", flush=True)
        campaign.finish(campaign.run)
        seconds = time.monotonic() - began
        for fault, step in zip(faults, campaign.resumed(), strict=True):
            fault.resumed_from = step
        result = campaign.compare()
        log = campaign.run.with_suffix(".log").read_text()
    report(faults, result, seconds, log.count("skipping checkpoint"), arguments.output)


def report(faults: list[Fault], result: dict[str, Any], seconds: float, skipped: int, output: Path | None) -> None:
    """The table and the JSON; a failure of the campaign is a failure of this program."""
    rows = []
    for kind in dict.fromkeys(fault.kind for fault in faults):
        mine = [fault for fault in faults if fault.kind == kind]
        codes = sorted({fault.exit_code for fault in mine if fault.exit_code is not None})
        lost = [fault.reached - (fault.resumed_from or 0) for fault in mine]
        down = [fault.down_s for fault in mine if fault.down_s is not None]
        phases = ", ".join(dict.fromkeys(fault.met for fault in mine if fault.phase))
        rows.append(
            [
                kind,
                str(len(mine)),
                phases,
                ", ".join(map(str, codes)),
                str(max(lost)),
                f"{max(down):.1f}" if down else "-",
            ]
        )
    show(
        "Faults, and a run that ended with the undisturbed weights",
        ["fault", "count", "phases met", "exit codes", "most steps lost", "longest end, s"],
        rows,
    )
    kills = [fault for fault in faults if fault.kind in ("SIGKILL", "SIGTERM")]
    wrong = [fault for fault in faults if fault.exit_code not in fault.expected]
    values = {
        "kills": len(kills),
        "kills_in_the_phase_aimed_at": sum(fault.met == fault.phase for fault in kills),
        "broken_checkpoints_skipped": skipped,
        "seconds": round(seconds, 1),
        "comparison": result,
        "faults": [dataclasses.asdict(fault) for fault in faults],
    }
    path = record("faults", ("torch", "deepspeed"), values, output)
    print(f"{result} in {seconds:.0f} s; {path}")
    if wrong or result["checkpoints_differing"] or not result["losses_equal"]:
        sys.exit(f"FAILED: {wrong or result}")


if __name__ == "__main__":
    main()
