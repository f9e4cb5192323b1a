"""Pretrain a Llama under DeepSpeed. The launcher's target; the loop below is the whole of it, top to bottom.

    deepspeed train/pretrain.py --deepspeed ds_configs/zero3.json --recipe tinyllama_1.1b --data DATA --output RUN

Exit codes: 0 the run is complete, 2 a mistake in the input, 75 stopped by a signal after saving (run the same command
again to continue), 1 a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

_HERE = Path(__file__).resolve().parent
# The launcher puts this file's folder first on the path, where our module names would hide installed packages.
sys.path[:] = [str(_HERE.parent)] + [p for p in sys.path if Path(p or ".").resolve() not in (_HERE, _HERE.parent)]

from tinyllama.data.loader import HeldOut, Mixture  # noqa: E402
from tinyllama.errors import CheckpointError, ConfigError, UserError  # noqa: E402
from train import plan as planning  # noqa: E402
from train.batch import model_inputs  # noqa: E402
from train.recipe import Recipe, load_recipe  # noqa: E402
from train.schedule import learning_rate  # noqa: E402

STOPPED_BY_SIGNAL = 75  # EX_TEMPFAIL: try again later


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. The launcher adds --local_rank."""
    parser = argparse.ArgumentParser(prog="train/pretrain.py", description=__doc__.split("\n")[0])
    parser.add_argument("--deepspeed", required=True, metavar="JSON", help="how to run: ds_configs/zero3.json")
    parser.add_argument("--recipe", metavar="FILE", help="what to train (default: TinyLlama's 1.1B)")
    parser.add_argument("--data", default="data", metavar="DIR", help="folder of the recipe's token stores")
    parser.add_argument("--output", default="runs/pretrain", metavar="RUN", help="run directory")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.model to keep with the checkpoints")
    parser.add_argument("--resume", choices=("auto", "never", "must"), default="auto")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override the recipe")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def find_tokenizer(given: str | None, data: str, mixture: Mixture) -> Path | None:
    """The tokenizer.model that made the data: given, or beside the stores. Its checksum must be the stores'."""
    from tinyllama.data.store import file_sha256

    path = Path(given) if given else Path(data) / "tokenizer.model"
    if not path.exists():
        if given:
            raise ConfigError(f"tokenizer {given} does not exist", fix="give the tokenizer.model that made the data")
        return None
    if file_sha256(path) != mixture.tokenizer_sha256:
        raise ConfigError(f"tokenizer {path} did not make these stores", fix="give the tokenizer.model that did")
    return path


def parameter_groups(model, recipe: Recipe) -> list[dict]:
    """Two groups: matrices of the blocks and the head decay; norms and the input embedding do not."""
    decayed: list = []
    plain: list = []
    for name, parameter in model.named_parameters():
        (plain if parameter.ndim == 1 or "embed_tokens" in name else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": recipe.optimizer.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def build_optimizer(model, recipe: Recipe, offloaded: bool):
    """AdamW: torch's fused one, or DeepSpeed's for an optimizer that lives in host memory."""
    groups, settings = parameter_groups(model, recipe), recipe.optimizer
    if offloaded:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, adamw_mode=True)
    import torch

    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def run(arguments: argparse.Namespace) -> int:
    """One training run, from the command line to the last checkpoint. Returns the exit code."""
    # -- What and how, checked before anything heavy is imported ---------------------------------------------------
    recipe = load_recipe(arguments.recipe, arguments.set)
    deepspeed_config = planning.read_deepspeed(arguments.deepspeed)
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", ranks)))
    deepspeed_config, plan = planning.resolve_deepspeed(deepspeed_config, recipe, ranks, ranks_per_node)
    mixture = planning.open_mixture(recipe, arguments.data)
    tokenizer = find_tokenizer(arguments.tokenizer, arguments.data, mixture)
    held_out = [HeldOut(source, recipe.data.sequence_length) for source in mixture.sources]
    separator = mixture.separator_id if recipe.data.document_masking else None
    output = Path(arguments.output)

    # -- Distributed, device, resume --------------------------------------------------------------------------------
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", ranks))))
    import deepspeed

    from tinyllama import checkpoint
    from tinyllama.model.hf import fill
    from tinyllama.model.llama import Llama
    from train import state as saved
    from train.distributed import init_distributed
    from train.metrics import MetricsFile, TrainingConsole, peak_flops
    from train.validation import validate

    local_rank = int(os.environ.get("LOCAL_RANK", arguments.local_rank))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    init_distributed(deepspeed_config)
    # Signals and small flags travel apart from the GPU's work, so that they never wait for it.
    control = dist.new_group(backend="gloo")

    state: dict = {
        "step": 0,
        "tokens": 0,
        "optimizer_steps": 0,
        "mixture_sha256": mixture.sha256,
        "recipe": recipe.to_dict(),
    }
    found = None
    if arguments.resume != "never":
        # Rank 0 reads every byte for the checksums; the others take its word.
        chosen = [saved.newest_valid(output, lambda text: print(text, file=sys.stderr)) if rank == 0 else None]
        dist.broadcast_object_list(chosen, group=control)
        found = chosen[0]
        if found is None and arguments.resume == "must":
            raise CheckpointError(f"{output} has no valid checkpoint", fix="check --output, or use --resume auto")
    elif checkpoint.list_checkpoints(output):
        raise CheckpointError(f"{output} has checkpoints", fix="give another --output, or use --resume auto")
    if found:
        saved.refuse_other_run(found[1], state, found[0])
        state.update({key: found[1][key] for key in ("step", "tokens", "optimizer_steps")})

    # -- Model, optimizer, engine -----------------------------------------------------------------------------------
    with torch.device("meta"):  # every weight is filled below, from the checkpoint or the seed
        model = Llama(recipe.model)
    model = model.to_empty(device="cpu")
    model.model.activation_checkpointing = recipe.training.activation_checkpointing
    if found:
        fill(model, checkpoint.read_weights(found[0]), str(found[0]))
    else:
        model.initialize(recipe.training.seed)
    optimizer = build_optimizer(model, recipe, "offload_optimizer" in deepspeed_config["zero_optimization"])
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config)
    if recipe.training.compile:
        engine.compile()
    if found:
        saved.load_optimizer(engine, found[0], state["optimizer_steps"])

    # -- Run directory, console -------------------------------------------------------------------------------------
    total_steps = planning.num_steps(recipe)
    flops = recipe.model.flops_per_token(recipe.data.sequence_length)
    peak, peak_source = peak_flops()
    console = TrainingConsole(rank == 0, recipe.training.tokens, state["tokens"])
    metrics = None
    if rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        resolved = {
            "recipe": recipe.to_dict(),
            "deepspeed": deepspeed_config,
            "batch": {"micro": plan.micro, "accumulation": plan.accumulation, "ranks": ranks},
            "num_parameters": recipe.model.num_parameters,
            "total_steps": total_steps,
            "flops_per_token": flops,
            "peak_flops": peak if peak == peak else None,
            "peak_flops_source": peak_source,
            "mixture_sha256": mixture.sha256,
            "versions": saved.versions(),
        }
        (output / "config.partial").write_text(json.dumps(resolved, indent=2) + "\n")
        os.replace(output / "config.partial", output / "config.json")
        metrics = MetricsFile(output / "metrics.jsonl", state["step"])
    console.print(f"{recipe.model.num_parameters:,} parameters, {total_steps:,} steps of {plan}")
    console.print(f"[green]resumed[/] from {found[0]}" if found else "starting from new weights")

    # -- Signals: remember, finish the step, save, leave ------------------------------------------------------------
    stop = torch.zeros(1, dtype=torch.int32)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda *_: stop.fill_(1))

    def save() -> None:
        folder = saved.save(engine, output, state, tokenizer, recipe.checkpoint.keep_last)
        console.print(f"saved {folder}")

    # -- The loop ---------------------------------------------------------------------------------------------------
    engine.train()
    loss_sum = torch.zeros((), dtype=torch.float32, device=device)
    logged_at, logged_step = time.perf_counter(), state["step"]
    for step in range(state["step"], total_steps):
        # The mean is over the targets of the whole step, wherever they are. DeepSpeed averages over ranks and divides
        # by the accumulation, so both are multiplied back.
        targets_in_step = mixture.num_targets(range(step * plan.sequences, (step + 1) * plan.sequences))
        lr = learning_rate(state["tokens"], recipe)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr

        for micro_step in range(plan.accumulation):
            ids, targets = mixture.fetch(plan.samples(step, rank, micro_step))
            summed = engine(**model_inputs(ids, targets, separator, device))
            engine.backward(summed * (ranks * plan.accumulation / targets_in_step))
            engine.step()  # acts on the last micro-step only
            loss_sum += summed.detach() / targets_in_step
        if not engine.was_step_applied():
            raise FloatingPointError(
                f"step {step + 1}: the gradient is not finite; the weights are those of step {step}, nothing was saved"
            )
        state.update(step=step + 1, tokens=(step + 1) * plan.tokens, optimizer_steps=state["optimizer_steps"] + 1)
        state["epochs"] = mixture.epochs((step + 1) * plan.sequences)
        last = step + 1 == total_steps

        # -- Log: the one host sync -------------------------------------------------------------------------------
        if (step + 1) % recipe.training.log_every_steps == 0 or last:
            dist.all_reduce(loss_sum)
            seconds = (time.perf_counter() - logged_at) / (step + 1 - logged_step)
            entry = {
                "step": step + 1,
                "tokens": state["tokens"],
                "loss": loss_sum.item() / (step + 1 - logged_step),
                "lr": lr,
                "grad_norm": float(engine.get_global_grad_norm()),
                "tokens_per_s": plan.tokens / seconds,
                "mfu": plan.tokens * flops / seconds / (peak * ranks),
                "step_time_s": seconds,
                "skipped_steps": engine.skipped_steps,
                "epochs": state["epochs"],
            }
            if metrics:
                metrics.write(entry)
            console.step(entry)
            loss_sum.zero_()
            logged_at, logged_step = time.perf_counter(), step + 1

        # -- Validate, save, stop ---------------------------------------------------------------------------------
        if (step + 1) % recipe.validation.every_steps == 0 or last:
            results = validate(engine, held_out, recipe.validation.max_sequences, plan.micro, separator, device)
            if metrics:
                metrics.write({"step": step + 1, "tokens": state["tokens"], "validation": results})
            for name, result in results.items():
                console.print(
                    f"step {step + 1}: validation {name}: loss {result['loss']:.4f}, "
                    f"{result['bits_per_byte']:.4f} bits per byte"
                )
            logged_at = time.perf_counter()
        dist.all_reduce(stop, op=dist.ReduceOp.MAX, group=control)
        stopping = bool(stop)
        if (step + 1) % recipe.checkpoint.every_steps == 0 or last or stopping:
            save()
            logged_at = time.perf_counter()
        if stopping and not last:
            console.close()
            console.print(f"stopped by a signal after step {step + 1}; run the same command again to continue")
            return STOPPED_BY_SIGNAL
    console.close()
    console.print(f"done: {state['tokens']:,} tokens in {output}")
    return 0


def main() -> int:
    """Run, and turn a user's mistake into one red line (from rank 0 alone) and exit code 2."""
    arguments = parse_arguments()
    try:
        return run(arguments)
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            from rich.console import Console

            Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error:[/] {error}", markup=True)
        return 2


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Gloo's threads can abort a process that ends in order after its peers; everything is on disk by now.
    os._exit(code)
