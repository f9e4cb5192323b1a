"""The training step: ours, transformers' and others', with and without DeepSpeed, on the same model, batch and machine.

    python benchmarks/train_step.py                         all rows, about half an hour on two cores
    python benchmarks/train_step.py --rows "ours, ZeRO-3" --repeats 5
    python benchmarks/train_step.py --rows gpu --shape 1.1b --sequence-length 2048 --micro 4,8,16

Each row is a process of its own: random tokens, one optimizer step to warm up and compile, then `--repeats` steps; after
the last row the next round begins, and the median over all rounds counts. All rows keep bf16 weights, fp32 master
weights, fp32 gradient sums and AdamW, as ds_configs/zero3.json says; without DeepSpeed the same is done by hand. FLOPs are
6 x matmul weights + 12 x layers x hidden x length a token (PaLM's convention), and stand beside what a bf16 matmul reaches
in the same run. The JSON is written after every row; a row that failed or took too long has all that it printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from device_under_test import find_device
from record import record, show
from step_rows import SHAPES, Plain, Row, WithDeepSpeed, be_one_rank, build, random_batches

ROOT = Path(__file__).resolve().parent.parent
ROWS = {
    "transformers, ZeRO-3": Row("transformers", 3, None),
    "transformers compiled, no DeepSpeed": Row("transformers", None, "whole"),
    "litgpt compiled, no DeepSpeed": Row("litgpt", None, "whole"),
    "transformers, ZeRO-3, memory kept as ours": Row("transformers", 3, None, kept=True),
    "transformers compiled, no DeepSpeed, memory kept as ours": Row("transformers", None, "whole", kept=True),
    "ours eager, ZeRO-3": Row("ours", 3, None, kept=True),
    "ours, plain torch loop": Row("ours", None, "block", kept=True),
    "ours, ZeRO-3": Row("ours", 3, "block", kept=True),
    "ours, ZeRO-3, memory given back": Row("ours", 3, "block"),
    "ours compiled whole, ZeRO-3": Row("ours", 3, "whole", kept=True),
}
GPU_ROWS = {
    f"ours {name}, {'no DeepSpeed' if stage is None else f'ZeRO-{stage}'}": Row("ours", stage, compiled, kept=True)
    for name, compiled in (("eager", None), ("by blocks", "block"), ("whole", "whole"), ("DeepCompile", "deepcompile"))
    for stage in (None, 1, 3)
    if not (compiled == "deepcompile" and stage is None)
} | {"ours by blocks, recomputed, ZeRO-1": Row("ours", 1, "block", recomputed=True, kept=True)}
EVERY_ROW = ROWS | GPU_ROWS


def measure(row: Row, arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second and memory of one row. Runs in a process that does nothing else."""
    import torch

    from tinyllama import host_memory

    found = find_device()
    if row.kept and found.kind == "cpu":
        host_memory.keep()  # as train/pretrain.py does
    device = found.torch_device
    if row.stage is not None:
        be_one_rank(found.kind)
    torch.manual_seed(1)
    config, length, micro = SHAPES[arguments.shape], arguments.sequence_length, arguments.micro[0]
    accumulation = max(1, arguments.step_tokens // (micro * length))
    model = build(row, config, device)
    made: Any
    if row.stage is None:
        made = Plain(model, row.compiled, device)
    else:
        free = found.memory_bytes()[0] if found.kind == "cuda" else None
        made = WithDeepSpeed(model, row, accumulation, micro, length, free_bytes=free)
    batches = random_batches(config.vocab_size, accumulation, micro, length, device)
    step_tokens = accumulation * micro * length

    seconds = []
    for index in range(arguments.repeats + 1):
        if index < 2:
            host_memory.trim()  # before and after the first step, as train/pretrain.py does
        began = time.perf_counter()
        made.step(batches, 1 / step_tokens)
        found.synchronize()
        seconds.append(time.perf_counter() - began)
    return {
        "step_s": [round(s, 3) for s in seconds[1:]],
        "first_step_s": round(seconds[0], 3),
        "peak_gib": found.peak_bytes() / 2**30,
        "step_tokens": step_tokens,
        "micro": micro,
    }


def matmul_flops() -> dict[str, Any]:
    """FLOP/s of a bf16 matmul on this device: the best of ten of 4096 cubed on a CPU, the median of twenty of 8192 cubed,
    timed on the device itself, on a GPU (where 4096 cubed, with a wait after each product, reads low).
    """
    import torch

    device = find_device()
    size, repeats = (4096, 10) if device.kind == "cpu" else (8192, 20)
    a, b = (torch.randn(size, size, device=device.torch_device).bfloat16() for _ in range(2))
    times = device.times_ms(lambda: a @ b, repeats, warmup=0 if device.kind == "cpu" else 3)
    chosen = min(times) if device.kind == "cpu" else statistics.median(times)
    return {"flops": 2 * size**3 / (chosen / 1000), "size": size}


# -- All rows -------------------------------------------------------------------------------------------------------------


def in_own_process(*arguments: str, timeout_s: float) -> dict[str, Any]:
    """What this script prints as its last line when it is called so; all that it printed where it fails or is too slow."""
    command = [sys.executable, __file__, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        said = b"\n".join(part for part in (error.stdout, error.stderr) if part).decode(errors="replace")
        return {"failed": f"timed out after {timeout_s:.0f} s\n{said}"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"failed": f"{done.stdout}\n{done.stderr}\nexit code {done.returncode}".strip()}
    return json.loads(lines[-1])


def merged(before: dict[str, Any] | None, found: dict[str, Any]) -> dict[str, Any]:
    """A row's figures over its rounds: the median step, the first step of the first process, the highest peak. A round that
    failed beside others that did not is counted.
    """
    good = before if before and "step_s" in before else None
    failed_rounds = (before or {}).get("failed_rounds", 0) + ("failed" in found)
    if "failed" in found:
        return {**(good or found), "failed_rounds": failed_rounds}
    if failed_rounds:
        found["failed_rounds"] = failed_rounds
    if good:
        found["step_s"] = good["step_s"] + found["step_s"]
        found["first_step_s"] = good["first_step_s"]
        found["peak_gib"] = max(good["peak_gib"], found["peak_gib"])
    found["tokens_per_s"] = found["step_tokens"] / statistics.median(found["step_s"])
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rows", help='names of rows, separated by semicolons; "gpu" for those of a GPU; default all others'
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="125m")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument(
        "--micro", type=lambda t: [int(n) for n in t.split(",")], default=[4], help="sequences at a time"
    )
    parser.add_argument("--step-tokens", type=int, default=8192, help="tokens of an optimizer step")
    parser.add_argument("--repeats", type=int, default=3, help="steps that are timed in each process")
    parser.add_argument("--rounds", type=int, default=2, help="processes a row, all rows in turn")
    parser.add_argument("--row-timeout", type=float, default=1800, help="seconds of one process (default 1800)")
    parser.add_argument("--output", type=Path, help="JSON; default benchmarks/results/train_step.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--matmul", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def reason_of(failed: str) -> str:
    """The line of an error's text that says most: the last that names an error, else the last."""
    lines = [line.strip() for line in failed.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line or line.startswith("timed out")]
    return (named or lines or ["no output"])[-1]


def values_of(arguments: argparse.Namespace, ceilings: list[dict[str, Any]], results: dict[str, Any]) -> dict[str, Any]:
    """What the JSON says beside machine and versions; adds to each row what follows from the others."""
    config, length = SHAPES[arguments.shape], arguments.sequence_length
    flops, ceiling = config.flops_per_token(length), max(found["flops"] for found in ceilings)
    base = results.get("transformers, ZeRO-3", {}).get("tokens_per_s")
    for found in results.values():
        if "tokens_per_s" in found:
            found["matmul_frac"] = found["tokens_per_s"] * flops / ceiling
            found["of_transformers"] = found["tokens_per_s"] / base if base else None
    return {
        "shape": dataclasses.asdict(config),
        "sequence_length": length,
        "flops_per_token": flops,
        "matmul_flops": ceiling,
        "matmul_size": ceilings[0]["size"],
        "matmul_flops_between_rounds": [found["flops"] for found in ceilings],
        "rows": results,
    }


def print_rows(arguments: argparse.Namespace, values: dict[str, Any]) -> None:
    """The table."""
    rows = []
    for label, found in values["rows"].items():
        if "tokens_per_s" not in found:
            rows.append([label, "-", "-", "-", "-", reason_of(found["failed"])[:60]])
            continue
        ratio = f"{found['of_transformers']:.2f}" if found["of_transformers"] else "-"
        figures = [f"{found['tokens_per_s']:,.0f}", ratio, f"{found['matmul_frac']:.2f}", f"{found['peak_gib']:.1f}"]
        rows.append([label, *figures, f"{found['first_step_s']:.0f}"])
    columns = ["", "tokens/s", "of transformers", "of the matmul", "peak GiB", "first step s"]
    title = f"{arguments.shape}, T={arguments.sequence_length}, {arguments.step_tokens:,} tokens a step, bf16"
    show(title, columns, rows)
    matmul = f"matmul {values['matmul_size']} cubed in bf16: {values['matmul_flops'] / 1e9:,.0f} GFLOP/s"
    print(f"{values['flops_per_token'] / 1e6:.1f} MFLOP a token; {matmul}")


def main() -> None:
    arguments = parse()
    sys.path.insert(0, str(ROOT))
    if arguments.matmul:
        print(json.dumps(matmul_flops()))
        return
    if arguments.one:
        print("\n" + json.dumps(measure(EVERY_ROW[arguments.one], arguments)), flush=True)
        os._exit(0)

    named = list(GPU_ROWS) if arguments.rows == "gpu" else (arguments.rows or "").split(";")
    names = [name.strip() for name in named] if arguments.rows else list(ROWS)
    if unknown := [name for name in names if name not in EVERY_ROW]:
        sys.exit(f"error: --rows {unknown[0]}; valid: {'; '.join(EVERY_ROW)}")
    results: dict[str, dict[str, Any]] = {}

    def matmul() -> dict[str, Any]:
        found = in_own_process("--matmul", timeout_s=arguments.row_timeout)
        if "failed" in found:
            sys.exit(f"error: the matmul failed\n{found['failed']}")
        return found

    def write() -> Path:
        """All rows so far: what is measured stays, whatever ends this process."""
        packages = ["torch", "deepspeed", "transformers"]
        if any("litgpt" in label and "tokens_per_s" in found for label, found in results.items()):
            packages.append("litgpt")
        return record("train_step", packages, values_of(arguments, ceilings, results), arguments.output)

    ceilings = [matmul()]
    passed = ["--shape", arguments.shape, "--sequence-length", str(arguments.sequence_length)]
    passed += ["--step-tokens", str(arguments.step_tokens), "--repeats", str(arguments.repeats)]
    for round_number in range(arguments.rounds):
        for name in names:
            for micro in arguments.micro:
                label = name if len(arguments.micro) == 1 else f"{name}, micro {micro}"
                given = ("--one", name, "--micro", str(micro), *passed)
                found = in_own_process(*given, timeout_s=arguments.row_timeout)
                said = reason_of(found["failed"]) if "failed" in found else found["step_s"]
                print(f"{round_number + 1}/{arguments.rounds} {label}: {said}", flush=True)
                results[label] = merged(results.get(label), found)
                write()
        ceilings.append(matmul())
    print_rows(arguments, values_of(arguments, ceilings, results))
    print(write())


if __name__ == "__main__":
    main()
