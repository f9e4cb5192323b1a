"""The training step: ours, transformers' and others', with and without DeepSpeed, on the same model, batch and machine.

    python benchmarks/train_step.py                         all rows, about half an hour on two cores
    python benchmarks/train_step.py --rows "ours, ZeRO-3" --repeats 5
    python benchmarks/train_step.py --rows gpu --shape 1.1b --sequence-length 2048 --micro 4,8,16

Each row is a process of its own: random tokens, one optimizer step to warm up and compile, then `--repeats` steps; after
the last row the next round begins, and the median over all rounds counts. All rows keep bf16 weights, fp32 master
weights, fp32 gradient sums and AdamW, as ds_configs/zero3.json says; without DeepSpeed the same is done by hand. FLOPs are
6 x matmul weights + 12 x layers x hidden x length a token (PaLM's convention), and stand beside what a 4096-cubed bf16
matmul reaches in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import record, show

from tinyllama.model.config import ModelConfig

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "125m": ModelConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
    ),
    "1.1b": ModelConfig(),
    "tiny": ModelConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to make the step. stage: DeepSpeed's; None without it. compiled: None, "block", "whole" or "deepcompile".

    recomputed: activations are made again in the backward pass, to save memory. kept: freed memory is, on a CPU, as
    train/pretrain.py does (tinyllama/host_memory.py).
    """

    model: str
    stage: int | None
    compiled: str | None
    recomputed: bool = False
    kept: bool = False


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


# -- One row, in its own process ----------------------------------------------------------------------------------------


def build(row: Row, config: ModelConfig, device: Any) -> Any:
    """A module that takes ids and targets (B, T) and gives the summed loss."""
    import torch

    if row.model == "ours":
        from tinyllama.model.kernels import Setting, choose
        from tinyllama.model.llama import Llama

        model = Llama(config)
        model.initialize(1)
        model.model.activation_checkpointing = row.recomputed
        model.use(choose({}, Setting(device, row.compiled is not None))[0])
        return model

    class WithLoss(torch.nn.Module):
        """As these libraries' own trainers do it: all logits, then torch's cross-entropy in fp32."""

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            found = self.inner(ids)
            logits = found if isinstance(found, torch.Tensor) else found.logits
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")

    if row.model == "transformers":
        from transformers import LlamaConfig, LlamaForCausalLM

        return WithLoss(LlamaForCausalLM(LlamaConfig(**config.to_hf())))
    from litgpt import GPT, Config

    return WithLoss(
        GPT(
            Config(
                n_layer=config.num_hidden_layers,
                n_head=config.num_attention_heads,
                n_query_groups=config.num_key_value_heads,
                n_embd=config.hidden_size,
                intermediate_size=config.intermediate_size,
                vocab_size=config.vocab_size,
                padded_vocab_size=config.vocab_size,
                block_size=config.max_position_embeddings,
                rotary_percentage=1.0,
                parallel_residual=False,
                bias=False,
                norm_class_name="RMSNorm",
                mlp_class_name="LLaMAMLP",
            )
        )
    )


class Plain:
    """The same precision as DeepSpeed's bf16, by hand, without any of its machinery: the floor for one device."""

    def __init__(self, model: Any, compiled: str | None, device: Any) -> None:
        import torch

        self.master = [p.detach().float().clone() for p in model.parameters()]
        self.model = model.bfloat16().to(device)
        self.master = [p.to(device) for p in self.master]
        self.optimizer = torch.optim.AdamW(self.master, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        if compiled == "block":
            self.model.compile_blocks()
        elif compiled:
            self.model.compile()

    def step(self, micro_batches: list[tuple[Any, Any]], scale: float) -> None:
        import torch

        for ids, targets in micro_batches:
            (self.model(ids, targets) * scale).backward()
            for master, parameter in zip(self.master, self.model.parameters(), strict=True):
                if master.grad is None:
                    master.grad = parameter.grad.float()
                else:
                    master.grad += parameter.grad
                parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.master, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(self.master, self.model.parameters(), strict=True):
                parameter.copy_(master)
                master.grad = None


class WithDeepSpeed:
    """DeepSpeed's engine on the shipped JSON."""

    def __init__(self, model: Any, row: Row, accumulation: int, micro: int, length: int) -> None:
        import deepspeed
        import torch

        from train.distributed import init_distributed
        from train.plan import read_deepspeed, resolve_deepspeed
        from train.recipe import Recipe

        config = read_deepspeed(ROOT / "ds_configs" / f"zero{row.stage}.json")
        recipe = Recipe.from_dict(
            {
                "model": {"max_position_embeddings": max(2048, length)},
                "data": {"sequence_length": length},
                "training": {"batch_tokens": accumulation * micro * length, "micro_batch_sequences": micro},
            }
        )
        resolved, _ = resolve_deepspeed(config, recipe, 1)
        if row.compiled == "deepcompile":
            resolved["compile"] = {"deepcompile": True}
        init_distributed(resolved)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        if row.compiled == "block" and row.stage == 3:
            deepspeed.utils.set_z3_leaf_modules(model, [type(model.model.layers[0])])
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=resolved)
        if row.compiled == "block":
            self.engine.module.compile_blocks()
        elif row.compiled:
            self.engine.compile()

    def step(self, micro_batches: list[tuple[Any, Any]], scale: float) -> None:
        for ids, targets in micro_batches:
            # DeepSpeed divides by the accumulation
            self.engine.backward(self.engine(ids, targets) * (scale * len(micro_batches)))
            self.engine.step()


def measure(row: Row, arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second and memory of one row. Runs in a process that does nothing else."""
    import torch

    from tinyllama import host_memory

    cuda = torch.cuda.is_available()
    if row.kept and not cuda:
        host_memory.keep()  # as train/pretrain.py does
    device = torch.device("cuda" if cuda else "cpu")
    if row.stage is not None:
        port = str(20000 + os.getpid() % 20000)
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        os.environ["LOCAL_SIZE"] = "1"  # as DeepSpeed's launcher; without it, a process is started at each reduction
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    torch.manual_seed(1)
    config, length, micro = SHAPES[arguments.shape], arguments.sequence_length, arguments.micro[0]
    accumulation = max(1, arguments.step_tokens // (micro * length))
    model = build(row, config, device)
    made: Any
    if row.stage is None:
        made = Plain(model, row.compiled, device)
    else:
        made = WithDeepSpeed(model, row, accumulation, micro, length)
    generator = torch.Generator().manual_seed(2)
    shape = (accumulation, micro, length + 1)
    tokens = torch.randint(0, config.vocab_size, shape, generator=generator).to(device)
    batches = [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in tokens]
    scale = 1 / (accumulation * micro * length)

    seconds = []
    for index in range(arguments.repeats + 1):
        if index < 2:
            host_memory.trim()  # before and after the first step, as train/pretrain.py does
        began = time.perf_counter()
        made.step(batches, scale)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    if cuda:
        peak_gib = torch.cuda.max_memory_allocated() / 2**30
    else:
        kib = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        peak_gib = int(kib[1]) / 2**20 if kib else float("nan")
    step_tokens = accumulation * micro * length
    return {
        "step_s": [round(s, 3) for s in seconds[1:]],
        "first_step_s": round(seconds[0], 3),
        "peak_gib": peak_gib,
        "step_tokens": step_tokens,
        "micro": micro,
    }


def matmul_flops() -> float:
    """FLOP/s of a 4096-cubed bf16 matmul on this device: the best of ten."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(4096, 4096, device=device).bfloat16() for _ in range(2))
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * 4096**3 / best


# -- All rows -------------------------------------------------------------------------------------------------------------


def in_own_process(*arguments: str) -> dict[str, Any]:
    """What this script prints as its last line when it is called so; a reason where it fails."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"failed": ((done.stderr.strip() or "no output").splitlines() or ["?"])[-1]}
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
    parser.add_argument("--output", type=Path, help="JSON; default benchmarks/results/train_step.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--matmul", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    sys.path.insert(0, str(ROOT))
    if arguments.matmul:
        print(json.dumps({"flops": matmul_flops()}))
        return
    if arguments.one:
        print("\n" + json.dumps(measure(EVERY_ROW[arguments.one], arguments)), flush=True)
        os._exit(0)

    named = list(GPU_ROWS) if arguments.rows == "gpu" else (arguments.rows or "").split(";")
    names = [name.strip() for name in named] if arguments.rows else list(ROWS)
    if unknown := [name for name in names if name not in EVERY_ROW]:
        sys.exit(f"error: --rows {unknown[0]}; valid: {'; '.join(EVERY_ROW)}")
    config, length = SHAPES[arguments.shape], arguments.sequence_length
    flops = config.flops_per_token(length)
    results: dict[str, dict[str, Any]] = {}
    ceilings = [in_own_process("--matmul")["flops"]]
    passed = ["--shape", arguments.shape, "--sequence-length", str(length), "--step-tokens", str(arguments.step_tokens)]
    passed += ["--repeats", str(arguments.repeats)]
    for round_number in range(arguments.rounds):
        for name in names:
            for micro in arguments.micro:
                label = name if len(arguments.micro) == 1 else f"{name}, micro {micro}"
                found = in_own_process("--one", name, "--micro", str(micro), *passed)
                print(
                    f"{round_number + 1}/{arguments.rounds} {label}: {found.get('failed') or found['step_s']}",
                    flush=True,
                )
                results[label] = merged(results.get(label), found)
        ceilings.append(in_own_process("--matmul")["flops"])
    ceiling = max(ceilings)

    base = results.get("transformers, ZeRO-3", {}).get("tokens_per_s")
    rows = []
    for label, found in results.items():
        if "failed" in found:
            rows.append([label, "-", "-", "-", "-", found["failed"][:60]])
            continue
        found["matmul_frac"] = found["tokens_per_s"] * flops / ceiling
        found["of_transformers"] = found["tokens_per_s"] / base if base else None
        ratio = f"{found['of_transformers']:.2f}" if base else "-"
        figures = [f"{found['tokens_per_s']:,.0f}", ratio, f"{found['matmul_frac']:.2f}", f"{found['peak_gib']:.1f}"]
        rows.append([label, *figures, f"{found['first_step_s']:.0f}"])
    columns = ["", "tokens/s", "of transformers", "of the matmul", "peak GiB", "first step s"]
    show(f"{arguments.shape}, T={length}, {arguments.step_tokens:,} tokens a step, bf16", columns, rows)
    print(f"{flops / 1e6:.1f} MFLOP a token; matmul 4096 cubed in bf16: {ceiling / 1e9:,.0f} GFLOP/s")
    values = {
        "shape": dataclasses.asdict(config),
        "sequence_length": length,
        "flops_per_token": flops,
        "matmul_flops": ceiling,
        "matmul_flops_between_rounds": ceilings,
        "rows": results,
    }
    packages = ["torch", "deepspeed", "transformers"]
    if any("litgpt" in label and "failed" not in found for label, found in results.items()):
        packages.append("litgpt")
    print(record("train_step", packages, values, arguments.output))


if __name__ == "__main__":
    main()
