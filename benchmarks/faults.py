"""A run of two ranks that is killed in every phase, and worse, and must end with the weights of an undisturbed one.

    python benchmarks/faults.py [--short]

One run meets every fault in turn, each some steps after the one before; after each it is started again by the same
command. The ranks wait in the phase that a kill is aimed at until it has struck.
SIGKILL and SIGTERM go to rank 0, rank 1 and both, in each phase of a step and of a save. Then: no room for a file during
a save, a bit flipped in the newest checkpoint, a rank that stands still (SIGSTOP), a loss that is NaN; SIGHUP and SIGKILL
to the command itself, other commands in the same directory while it trains, signals while it starts (at random moments of
the start, whichever those are), and a random bit flipped in each file of the newest checkpoint. Whenever a command has
ended, nothing that it started may be left, and its directory must be free. At the end every
checkpoint that the run wrote is compared with the undisturbed run's of the same step, weights and moments, bit for bit,
and so is every loss.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
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
FLIPPED = ("state.json", "manifest.json", "tokenizer.model", "rng-00001.json", "shard-00000.safetensors")
START_S = (0.2, 12.0)  # the moments of a signal while starting
STEPS_APART = 4  # two checkpoints from fault to fault
LEFT_S = 10.0  # for the processes of a command to end after it
ROOT = Path(__file__).resolve().parent.parent
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
    left: int = 0  # processes of the run that were there some seconds after its command
    refused: list[int] = dataclasses.field(default_factory=list)  # exit codes of the other commands

    @property
    def expected(self) -> tuple[int, ...]:
        """Exit codes that are right: of a kill the launcher's own, or that of the rank which noticed it first."""
        special = {"no room": (74,), "SIGSTOP": (76,), "nan": (70,), "SIGKILL": (76,), "SIGKILL to the command": (-9,)}
        return special.get(self.kind, (75,))

    @property
    def number(self) -> signal.Signals:
        """The signal that is sent."""
        name = self.kind.split()[0]
        return signal.Signals[name] if name.startswith("SIG") else signal.SIGTERM

    @property
    def inject(self) -> list[str]:
        if self.kind == "nan":
            return ["--inject", f"nan@{self.step}"]
        # The ranks stand still while the other commands start and are refused, which is no hang.
        longer = ["--set", "health.hang_timeout_s=300"] if self.kind == "second command" else []
        return ["--inject", f"hold={self.phase}@{self.step}", *longer] if self.is_held else []

    @property
    def is_held(self) -> bool:
        """Whether the ranks wait in the phase; a save in the background is met as it is."""
        return self.phase not in ("", "write", *FLIPPED)


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
    faults += [("SIGHUP", ranks, "forward") for ranks in ((0,), (1,), (0, 1))]
    for kind in ("SIGHUP to the command", "SIGKILL to the command", "second command"):
        faults += [(kind, (), phase) for phase in ("forward", "save")]
    faults += [
        (f"{name} while starting", (), "") for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") for _ in range(3)
    ]
    faults += [("flip", (), name) for name in FLIPPED]
    chosen: list[tuple[str, tuple[int, ...], str]] = [*kills, *faults]
    if short:
        chosen = [("SIGKILL", (1,), "backward"), ("corrupt", (1,), ""), ("SIGTERM while starting", (), "")]
        chosen += [("second command", (), "forward"), ("SIGKILL to the command", (), "forward"), ("nan", (), "")]
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
        self._random = random.Random(7)
        self.settings = {**SETTINGS, "training.tokens": num_steps * SETTINGS["training.batch_tokens"]}

    def start(self, run: Path, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tinyllama", "train", "--recipe", "demo", "--data", str(self.data)]
        command += ["--output", str(run), "--num-accelerators", "2"]
        command += [part for key, value in self.settings.items() for part in ("--set", f"{key}={value}")]
        command += more
        log = open(run.with_suffix(".log"), "a")
        environment = {**os.environ, "HERE": str(run)}
        return subprocess.Popen(command, stdout=log, stderr=log, text=True, cwd=ROOT, env=environment)

    def finish(self, run: Path) -> None:
        if (code := self.start(run).wait(timeout=600)) != 0:
            raise RuntimeError(f"exit code {code}: see {run.with_suffix('.log')}")

    def strike(self, fault: Fault) -> None:
        """Start the run, disturb it, and wait for its end."""
        before = len(checkpoint.list_checkpoints(self.run))
        for mark in self.run.glob("held-*"):
            mark.unlink()
        (self.run / "go-on").unlink(missing_ok=True)
        if found := checkpoint.list_checkpoints(self.run):  # a signal may have come some steps later than it was sent
            fault.step = max(fault.step, found[-1][0] // 2 * 2 + 2 + (fault.phase in ("save", "write")))
        process = self.start(self.run, *fault.inject)
        if fault.kind.endswith("while starting"):
            struck: float | None = self._hit_while_starting(fault, process)
        elif fault.phase and not fault.ranks and fault.is_held:
            struck = self._hit_command(fault, process)
        else:
            struck = self._wait_and_hit(fault, process)
        fault.exit_code = process.wait(timeout=120)
        fault.down_s = round(time.monotonic() - struck, 2) if struck else None
        deadline = time.monotonic() + LEFT_S
        while (left := self._family()) and time.monotonic() < deadline:
            time.sleep(0.05)
        fault.left = len(left)
        beats = [heartbeat.read(self.run, rank) for rank in (0, 1)]
        # A signal that is answered ends the run after the step under way.
        fault.reached = max(beat.get("step", 0) for beat in beats) + (fault.exit_code == 75 and fault.phase != "")
        if fault.kind in ("corrupt", "flip"):
            newest = checkpoint.list_checkpoints(self.run)[-1][1]
            name = fault.phase or f"shard-{fault.ranks[0]:05d}.safetensors"
            content = bytearray((newest / name).read_bytes())
            bit = 4 * len(content) if fault.kind == "corrupt" else self._random.randrange(8 * len(content))
            content[bit // 8] ^= 1 << bit % 8
            (newest / name).write_bytes(content)
        if len(checkpoint.list_checkpoints(self.run)) < before:
            raise RuntimeError(f"{fault} has cost a checkpoint")

    def _family(self) -> list[str]:
        """The processes of the disturbed run, whoever their parent is."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and f"HERE={self.run}\0".encode() in (entry / "environ").read_bytes():
                    found.append(entry.name)
        return found

    def _hit_while_starting(self, fault: Fault, process: subprocess.Popen[str]) -> float:
        """A signal at a random moment; early or late in the start, or where that is short, in the first steps."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self._random.uniform(*START_S))
        if process.poll() is not None:
            raise RuntimeError(f"{fault}: the run ended before it, exit code {process.returncode}")
        process.send_signal(fault.number)
        return time.monotonic()

    def _hit_command(self, fault: Fault, process: subprocess.Popen[str]) -> float:
        """A signal to the command, or other commands beside it, while its ranks are held; one signal ends it."""
        while not all((self.run / f"held-{rank}").exists() for rank in (0, 1)):
            if process.poll() is not None:
                raise RuntimeError(f"{fault}: the run ended before it, exit code {process.returncode}")
            time.sleep(0.002)
        fault.met = heartbeat.read(self.run, 0)["phase"]
        if fault.kind == "second command":
            others = [self.start(self.run, "--resume", resume) for resume in ("auto", "never", "must")]
            plain = [sys.executable, "train/pretrain.py", "--deepspeed", "ds_configs/zero3.json", "--recipe", "demo"]
            plain += ["--data", str(self.data), "--output", str(self.run)]
            alone = {**os.environ, "RANK": "0", "WORLD_SIZE": "1"}
            others.append(subprocess.Popen(plain, text=True, env=alone, cwd=ROOT, stderr=subprocess.DEVNULL))
            fault.refused = [other.wait(timeout=120) for other in others]
        process.send_signal(fault.number)
        struck = time.monotonic()
        (self.run / "go-on").touch()
        return struck

    def _wait_and_hit(self, fault: Fault, process: subprocess.Popen[str]) -> float | None:
        """Returns when the fault struck, as the rank was in its phase; None where the run does it to itself."""
        if fault.kind == "nan":
            return None
        partial = self.run / "checkpoints" / f"partial-{checkpoint.step_name(fault.step + 1)}"
        aim = fault.ranks[0] if fault.ranks else 0
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
                if fault.phase in ("", "write", beat["phase"], *FLIPPED) or beat["step"] > fault.step:
                    break
        pids = [heartbeat.read(self.run, rank)["pid"] for rank in fault.ranks or (0,)]
        for pid in pids:
            if fault.kind == "no room":
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
            else:
                os.kill(pid, fault.number)
        fault.met = "write" if fault.phase == "write" and partial.exists() else beat["phase"]
        (self.run / "go-on").touch()
        return time.monotonic()

    def resumed(self, end: int) -> int:
        """The checkpoint that the run went on from the first time that it did so after this place of its log."""
        for line in self.run.with_suffix(".log").read_text()[end:].splitlines():
            if line.startswith("resumed from"):
                return int(line.split()[2].rpartition("-")[2])
        return 0

    def compare(self) -> dict[str, Any]:
        """Every checkpoint and every loss of the disturbed run against the undisturbed one's."""
        differing = []
        found = checkpoint.list_checkpoints(self.run)
        both = [at for at in found if at[0] % SETTINGS["checkpoint.every_steps"] == 0]  # the rest are signals'
        for step, folder in both:
            other = self.whole / "checkpoints" / checkpoint.step_name(step)
            sums = [checkpoint.read_json(path / "state.json")["proof"]["sums"] for path in (folder, other)]
            if sums[0] != sums[1] or not _equal(folder, other):
                differing.append(step)
        losses = [
            [(e["step"], e["loss"]) for e in map(json.loads, (run / "metrics.jsonl").open()) if "loss" in e]
            for run in (self.run, self.whole)
        ]
        return {
            "checkpoints_compared": len(both),
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
    parser.add_argument("--short", action="store_true", help="six faults")
    parser.add_argument("--only", type=lambda text: text.split(","), help="kinds: SIGKILL,SIGTERM,no room,corrupt,...")
    parser.add_argument("--data", type=Path, help="stores prose and code with 600 pieces (default: made)")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    arguments = parser.parse_args()
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup a run would ignore it as well; not here
        signal.signal(signal.SIGHUP, lambda *_: None)
    faults = plan(arguments.short, arguments.only)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        data = arguments.data or prepare(Path(folder))
        campaign = Campaign(Path(folder), data, faults[-1].step + 2 * STEPS_APART * (1 + len(faults) // 4))
        campaign.finish(campaign.whole)
        began, ends = time.monotonic(), []
        for number, fault in enumerate(faults, 1):
            campaign.strike(fault)
            ends.append(len(campaign.run.with_suffix(".log").read_text()))
            print(f"{number}/{len(faults)} {dataclasses.asdict(fault)}", flush=True)
        campaign.finish(campaign.run)
        seconds = time.monotonic() - began
        for fault, end in zip(faults, ends, strict=True):
            fault.resumed_from = campaign.resumed(end)
        result = campaign.compare()
        log = campaign.run.with_suffix(".log").read_text()
    report(faults, result, seconds, log.count("skipping checkpoint"), arguments.output)


def report(faults: list[Fault], result: dict[str, Any], seconds: float, skipped: int, output: Path | None) -> None:
    """The table and the JSON; a failure of the campaign is a failure of this program."""
    rows = []
    for kind in dict.fromkeys(fault.kind for fault in faults):
        mine = [fault for fault in faults if fault.kind == kind]
        codes = sorted({fault.exit_code for fault in mine if fault.exit_code is not None})
        lost = [max(0, fault.reached - (fault.resumed_from or 0)) for fault in mine]  # none while starting
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
    wrong = [
        fault
        for fault in faults
        if fault.exit_code not in fault.expected or fault.left or any(code != 2 for code in fault.refused)
    ]
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
