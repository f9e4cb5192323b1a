"""Pretrain a Llama under DeepSpeed. The launcher's target; the loop below is the whole of it, top to bottom.

    deepspeed train/pretrain.py --deepspeed ds_configs/zero3.json --recipe tinyllama_1.1b --data DATA --output RUN

Exit codes, for a supervisor:
    0   the run is complete
    2   a mistake in the input: correct it
    70  the run is unhealthy (a loss or gradient that is not finite, spike upon spike, weights that do not move)
    74  a checkpoint, or metrics, could not be written (a full disk): make room; the checkpoints before it stand
    75  stopped by a signal, after saving what there was to save: run the same command again
    76  a rank hung or died, here or on another machine; the stacks are in RUN/stacks: run the same command again
    1   any other failure
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import signal
import sys
import time
import traceback
from pathlib import Path

_HERE = Path(__file__).resolve().parent
# The launcher puts this file's folder first on the path, where our module names would hide installed packages.
sys.path[:] = [str(_HERE.parent)] + [p for p in sys.path if Path(p or ".").resolve() not in (_HERE, _HERE.parent)]

from train.stopping import BEFORE, STOPPED_BY_SIGNAL, Stop, launchers_above, say  # noqa: E402

STOP = Stop()
if __name__ == "__main__":
    STOP.install()  # before what takes long to import

from tinyllama import host_memory, locks, processes  # noqa: E402
from tinyllama.cli.app import print_error  # noqa: E402
from tinyllama.data.loader import HeldOut  # noqa: E402
from tinyllama.errors import DISK_FULL, ConfigError, UserError  # noqa: E402
from train import accelerators, before_launch, memory, profiling, start  # noqa: E402
from train import plan as planning  # noqa: E402
from train.accumulation import Accumulation  # noqa: E402
from train.batch import host_arrays  # noqa: E402
from train.determinism import make_deterministic  # noqa: E402
from train.distributed import from_rank_0, init_distributed  # noqa: E402
from train.feed import Feed  # noqa: E402
from train.health import FrozenWeights, LossGuard, SpikeLedger, UnhealthyRunError, fingerprint  # noqa: E402
from train.heartbeat import GRACE_S, HUNG, Heartbeat, Watchdog, code_of_a_peer, stack_file  # noqa: E402
from train.injection import parse as parse_injection  # noqa: E402
from train.metrics import take_monitors  # noqa: E402
from train.recipe import Recipe, load_recipe  # noqa: E402
from train.saver import SaveError, Saver, clear_partial  # noqa: E402
from train.schedule import describe as describe_schedule  # noqa: E402
from train.schedule import learning_rate  # noqa: E402
from train.terminal import Lasting  # noqa: E402

UNHEALTHY, SAVE_FAILED = 70, 74  # EX_SOFTWARE, EX_IOERR; and STOPPED_BY_SIGNAL, heartbeat.HUNG
# What gloo, NCCL and torch's store say when another process has gone.
LOST_CONNECTION = (
    *("connection closed by peer", "connection reset by peer", "connection refused", "broken pipe", "socket timeout"),
    *("remote process exited", "connection was likely closed", "failed to recv", "failed to send", "timed out after"),
    *("client socket has timed out", "timed out waiting", "wait timeout", "eaddrinuse"),
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. The launcher adds --local_rank."""
    parser = argparse.ArgumentParser(prog="train/pretrain.py", description=__doc__.split("\n")[0])
    parser.add_argument("--deepspeed", required=True, metavar="JSON", help="how to run: ds_configs/zero3.json")
    parser.add_argument("--recipe", metavar="FILE", help="what to train (default: TinyLlama's 1.1B)")
    parser.add_argument("--data", default="data", metavar="DIR", help="folder of the recipe's token stores")
    parser.add_argument("--output", default="runs/pretrain", metavar="RUN", help="run directory")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.model to keep with the checkpoints")
    parser.add_argument("--resume", choices=("auto", "never", "must"), default="auto")
    parser.add_argument("--init-from", metavar="DIR", help="start from these weights: Hugging Face Llama or checkpoint")
    parser.add_argument("--allow-rate-jump", action="store_true", help="resume though the learning rate jumps up")
    parser.add_argument("--profile", nargs="?", const=profiling.DEFAULT, metavar="FIRST:COUNT", help=profiling.HELP)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override the recipe")
    parser.add_argument("--inject", default="", help=argparse.SUPPRESS)  # faults: see train/injection.py
    parser.add_argument("--lock", metavar="TOKEN", help=argparse.SUPPRESS)  # the launcher holds the run directory
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def hold_directory(output: Path, token: str | None) -> str:
    """Rank 0: make sure that this run alone writes its directory. Returns what names the run to all who look at it.

    token: the launcher's lock, under which this rank works; without one (plain `deepspeed`) the rank takes the lock.
    """
    path = locks.inside(output)
    if token is None:
        return locks.take(path, output, "train/pretrain.py").token
    if (record := locks.read(path)).get("token") != token:
        raise ConfigError(f"{output} has been taken by {record.get('command')}", fix="start one run in a directory")
    return token


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


def run(arguments: argparse.Namespace, beat: Heartbeat) -> int:
    """One training run, from the command line to the last checkpoint. Returns the exit code. beat: this rank's."""
    # -- What and how, checked before anything heavy is imported ---------------------------------------------------
    recipe = load_recipe(arguments.recipe, arguments.set)
    output = Path(arguments.output)
    given_config, monitor_sections = take_monitors(planning.read_deepspeed(arguments.deepspeed), output)
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 0)))  # 0: not said
    ranks_per_node = local_size or ranks
    token = hold_directory(output, arguments.lock) if rank == 0 else ""
    deepspeed_config, plan = planning.resolve_deepspeed(given_config, recipe, ranks, ranks_per_node)
    mixture = planning.open_mixture(recipe, arguments.data)
    tokenizer = before_launch.find_tokenizer(arguments.tokenizer, arguments.data, mixture)
    held_out = [HeldOut(source, recipe.data.sequence_length) for source in mixture.sources]
    before_launch.check_output(output)
    separator = mixture.separator_id if recipe.data.document_masking else None
    injection = parse_injection(arguments.inject)
    profiled = profiling.parse(arguments.profile) if arguments.profile is not None else None

    # -- Distributed, device, resume --------------------------------------------------------------------------------
    accelerators.hide_gpus_if_unwanted()
    memory.use_expandable_segments()
    import torch
    import torch.distributed as dist

    local_rank = int(os.environ.get("LOCAL_RANK", arguments.local_rank))
    accelerators.refuse_too_many(max(local_rank + 1, local_size), torch.cuda.device_count())
    if recipe.training.deterministic:
        make_deterministic()  # before the GPU is touched
    if not torch.cuda.is_available():
        host_memory.keep()
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("LOCAL_SIZE", str(ranks_per_node))  # else DeepSpeed asks numactl at each reduction
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", ranks))))
    import deepspeed
    from rich.markup import escape

    from tinyllama import checkpoint
    from tinyllama.model.fp8 import set_precision
    from tinyllama.model.hf import fill
    from tinyllama.model.kernels import Setting, choose, confirm
    from tinyllama.model.llama import Block, Llama
    from train import generators
    from train import state as saved
    from train.evaluation import Evaluation
    from train.metrics import (
        MetricsFile,
        Monitors,
        TrainingConsole,
        device_name,
        kernel_table,
        peak_flops,
        peak_memory_bytes,
    )
    from train.proof import Proof
    from train.text_bytes import TextBytes
    from train.validation import validate

    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    init_distributed(deepspeed_config)
    # Signals and small flags travel apart from the GPU's work, so that they never wait for it.
    control = dist.new_group(backend="gloo")
    named = [token]
    dist.broadcast_object_list(named, group=control)
    beat.start(named[0])
    dist.barrier(group=control)
    watchdog = Watchdog(output, rank, ranks, recipe.health.first_step_timeout_s, beat.token)
    injection.attach(beat, STOP.received)
    free = memory.free_bytes(device, control)

    # What a checkpoint says of the run besides its weights; the first part changes from step to step.
    progress = {
        "step": 0,
        "tokens": 0,
        "optimizer_steps": 0,
        "skipped_steps": 0,
        "data_offset": 0,  # batches that a rewind left out: step s reads batch s + data_offset
        "loss_window": [],
        "spikes": [],
    }
    state: dict = {
        **progress,
        "mixture_sha256": mixture.sha256,
        "recipe": recipe.to_dict(),
        "init_from": None,
        "versions": saved.versions(),
        "git": saved.commit() if rank == 0 else {},
    }
    if rank == 0:
        clear_partial(output)
    # Rank 0 reads every byte for the checksums; the others take its word.
    found = from_rank_0(lambda: before_launch.choose_checkpoint(output, arguments.resume), control)
    rate_changes = None
    if found:
        allowed = arguments.allow_rate_jump
        rate_changes = before_launch.check_resume(found, recipe, mixture.sha256, arguments.init_from, allowed)
        state["init_from"] = found[1].get("init_from")
        state.update({key: found[1].get(key, start) for key, start in progress.items()})
    if free is not None:  # with a GPU its memory decides
        division = found[1].get("batch") if found else None
        deepspeed_config, plan = planning.resolve_deepspeed(given_config, recipe, ranks, ranks_per_node, free, division)
    state.update(deepspeed={**deepspeed_config, **monitor_sections}, batch=plan.division)

    # -- Model, optimizer, engine -----------------------------------------------------------------------------------
    with torch.device("meta"):  # every weight is filled below, from the checkpoint or the seed
        model = Llama(recipe.model)
    model = model.to_empty(device="cpu")
    model.model.activation_checkpointing = recipe.training.activation_checkpointing
    if found:
        fill(model, checkpoint.read_weights(found[0]), str(found[0]))
    elif arguments.init_from:
        asked = Path(arguments.init_from).expanduser().resolve()
        # One rank reads every byte for the checksums before any trusts the weights.
        origin, digest = from_rank_0(lambda: start.chosen(asked, recipe.model), control)
        state["init_from"] = {"path": str(asked), "sha256": digest}
        fill(model, start.tensors(origin), str(origin))
    else:
        model.initialize(recipe.training.seed)
    setting = Setting(
        device,
        compiled=recipe.training.compile is not None,
        documents=recipe.data.document_masking,
        deterministic=recipe.training.deterministic,
        low_precision=any(deepspeed_config.get(kind, {}).get("enabled") for kind in ("bf16", "fp16")),
    )
    kernels, choices = choose(dataclasses.asdict(recipe.training.kernels), setting)
    model.use(kernels)
    doubts: list[str] = []
    if device.type == "cuda":
        choices, doubts = confirm(kernels, choices, setting, recipe.model, recipe.data.sequence_length)
    bf16 = deepspeed_config.get("bf16", {}).get("enabled", False)
    micro_batch_tokens = plan.micro * recipe.data.sequence_length
    choices.append(set_precision(recipe.training.precision, bf16, model, device, micro_batch_tokens))
    if recipe.training.compile == "block" and deepspeed_config["zero_optimization"]["stage"] == 3:
        # A block's weights are gathered as one, outside of what is compiled.
        deepspeed.utils.set_z3_leaf_modules(model, [Block])
    optimizer = build_optimizer(model, recipe, "offload_optimizer" in deepspeed_config["zero_optimization"])
    with memory.explained(None):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config)
    if recipe.training.compile == "block":
        model.compile_blocks()
    elif recipe.training.compile == "whole":
        engine.compile()
    if found:
        saved.load_optimizer(engine, found[0], state["optimizer_steps"])
        generators.restore(found[0], rank)
    elif arguments.init_from:
        saved.load_masters(engine, start.tensors(origin))
    forward = {"separator_id": separator, "device": device, "beat": beat}
    proof = Proof(engine, mixture, held_out, plan.micro, forward) if recipe.checkpoint.proof else None
    if proof and found and "proof" in found[1]:
        proof.check(found[1]["proof"], (state["step"] + state["data_offset"]) * plan.sequences, found[0])

    # -- Run directory, console -------------------------------------------------------------------------------------
    total_steps = recipe.num_steps
    flops = recipe.model.flops_per_token(recipe.data.sequence_length)
    peak, peak_source = peak_flops()
    console = TrainingConsole(rank == 0, recipe.training.tokens, state["tokens"])
    metrics = ledger = monitors = None
    if rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        resolved = {
            "recipe": recipe.to_dict(),
            "deepspeed": state["deepspeed"],
            "batch": plan.division,
            "reduce_once": plan.reduce_once,
            "device": device_name(),
            "num_parameters": recipe.model.num_parameters,
            "total_steps": total_steps,
            "warmup_steps": recipe.warmup_steps,
            "flops_per_token": flops,
            "peak_flops": peak if math.isfinite(peak) else None,
            "peak_flops_source": peak_source,
            "init_from": state["init_from"],
            "kernels": {choice.operation: choice.kernel for choice in choices},
            "kernels_ran": {choice.operation: choice.ran for choice in choices if choice.ran},
            "mixture_sha256": mixture.sha256,
            "versions": state["versions"],
            "git": state["git"],
        }
        metrics = MetricsFile(output / "metrics.jsonl", state["step"])
        if state["step"] < total_steps:  # a finished run that is asked for again is no restart
            (output / "config.partial").write_text(json.dumps(resolved, indent=2) + "\n")
            os.replace(output / "config.partial", output / "config.json")
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            started = {"at": now, "ranks": ranks, "device": resolved["device"]}
            metrics.write({"step": state["step"], "tokens": state["tokens"], "started": started})
        ledger = SpikeLedger(output / "spikes.jsonl", state["spikes"])
        monitors = Monitors(monitor_sections)
    console.print(f"{recipe.model.num_parameters:,} parameters, {total_steps:,} steps of {plan}")
    console.print(describe_schedule(recipe))
    for line in planning.start_lines(deepspeed_config, recipe, plan, free, device_name()):
        console.print(escape(line))
    console.print(kernel_table(choices))
    if not math.isfinite(peak):
        console.print(f"[yellow]MFU is unknown[/]: {escape(peak_source)} (the table: tinyllama/hardware.py)")
    for doubt in doubts:
        console.print(f"[yellow]{escape(doubt)}[/]")
    began = (
        f"starting from the weights of {escape(state['init_from']['path'])}"
        if state["init_from"]
        else "starting from new weights"
    )
    console.print(f"[green]resumed[/] from {escape(str(found[0]))}" if found else began)
    if rate_changes:
        console.print(f"[yellow]{escape(rate_changes)}[/]")

    guard = LossGuard(recipe.health, device, state["loss_window"], state["spikes"], state["step"])
    frozen = FrozenWeights(recipe.health.frozen_after_steps)
    evaluation = Evaluation(recipe, engine, tokenizer, control, beat) if recipe.evaluation.every_steps else None
    saver = Saver(output, recipe.checkpoint, tokenizer, control, beat)
    if rank == 0 and (shortage := saver.shortage(recipe.model.num_parameters, state["step"], total_steps)):
        console.print(f"[yellow]{escape(shortage)}[/]")
    text_bytes = TextBytes(tokenizer)
    gradients = Accumulation(engine, plan.reduce_once)
    feed = Feed(
        lambda batch, n: host_arrays(*mixture.fetch(plan.samples(batch, rank, n)), separator), plan.accumulation, device
    )
    profiler = profiling.Profiler(profiled, output / "profile", rank == 0)

    def save() -> None:
        beat("save")
        guard.read()
        state.update(loss_window=guard.window(), spikes=guard.spikes)
        if proof:
            state["proof"] = proof.take((state["step"] + state["data_offset"]) * plan.sequences)
        beat("save")
        saver.save(engine, state)

    def report_save() -> None:
        if (ended := saver.take_finished()) and metrics and monitors:
            metrics.write(ended)
            monitors.write("train", ended["step"], ended)
            console.print(
                f"saved {checkpoint.step_name(ended['step'])} in {ended['save_s']:.1f} s, "
                f"of which the training waited {ended['save_stall_s']:.2f} s"
            )

    def report_profile() -> None:
        if text := profiler.close():
            console.print(escape(text))

    def report_spikes() -> None:
        for spike in guard.take_news():
            console.print(
                f"[yellow]step {spike['step']}: loss {spike['loss']:.3f} is a spike, above {spike['limit']:.3f}[/]: "
                f"{spike['action']}"
            )
            if ledger:
                ledger.write([spike])

    def rewind(batch: int) -> None:
        """Back to the last checkpoint; the batches since then, up to `batch`, are left out of the run."""
        nonlocal guard, metrics
        beat("rewind")
        saver.wait()
        # To one that the undisturbed run has too: a signal's, of a step between, would leave out other batches.
        chosen = from_rank_0(
            lambda: checkpoint.newest_whole(
                output, among=lambda at: at <= state["step"] and at % recipe.checkpoint.every_steps == 0
            ),
            control,
        )
        if chosen is None:
            raise UnhealthyRunError("a loss spike before the first checkpoint: there is nothing to rewind to")
        directory, old = chosen
        guard.spikes[-1].update(to=old["step"], left_out=[old["step"] + old["data_offset"], batch])
        report_spikes()
        spikes = guard.spikes
        state.update({key: old.get(key, start) for key, start in progress.items()})
        state.update(spikes=spikes, data_offset=batch + 1 - old["step"])
        if sum(spike.get("to") == old["step"] for spike in spikes) > recipe.health.max_interventions:
            raise UnhealthyRunError(f"step {old['step']}: rewound to it too often, health.max_interventions")
        saved.load_weights(engine, directory)
        saved.load_optimizer(engine, directory, state["optimizer_steps"])
        host_memory.trim()
        guard = LossGuard(recipe.health, device, state["loss_window"], spikes, state["step"])
        if metrics:
            metrics.close()
            metrics = MetricsFile(output / "metrics.jsonl", state["step"])

    # -- Signals, from now on: remember, finish the step, save, leave -----------------------------------------------
    STOP.hold()
    begun = torch.tensor([bool(STOP.received)], dtype=torch.int32)
    dist.all_reduce(begun, op=dist.ReduceOp.MAX, group=control)
    if begun.item():
        console.print(BEFORE)
        return STOPPED_BY_SIGNAL

    # -- The loop ---------------------------------------------------------------------------------------------------
    engine.train()
    host_memory.trim()
    logged_at, logged_step, first_step = time.perf_counter(), state["step"], state["step"]
    while (step := state["step"]) < total_steps:
        beat.step = step
        profiler.begin()
        batch = step + state["data_offset"]
        # The mean is over the targets of the whole step, wherever they are. DeepSpeed averages over ranks and divides
        # by the accumulation, so both are multiplied back.
        targets_in_step = mixture.num_targets(range(batch * plan.sequences, (batch + 1) * plan.sequences))
        weight = ranks * plan.accumulation / targets_in_step
        lr = learning_rate(state["tokens"], recipe)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr * injection.lr_factor(batch)

        loss = torch.zeros((), dtype=torch.float32, device=device)
        with memory.explained(plan, recipe.training.activation_checkpointing, step == first_step), gradients.step():
            for micro_step in range(plan.accumulation):
                beat("data")
                inputs = feed.take(batch, micro_step)
                beat("forward")
                summed = engine(**inputs) * injection.loss_factor(batch)
                loss += summed.detach() / targets_in_step
                beat("backward")
                if micro_step + 1 < plan.accumulation:
                    engine.backward(summed * weight)
                else:
                    # The loss of the step is whole before its last backward, which a sick one makes NaN (train/health.py).
                    dist.all_reduce(loss)
                    engine.backward(summed * (weight + guard.veto(loss, step, batch)))
                beat("step")
                gradients.added()
        if step == first_step:
            host_memory.trim()  # the optimizer's moments now lie where they stay
        action = guard.judge(engine.was_step_applied())
        if action == "rewind":
            rewind(batch)
            logged_at, logged_step = time.perf_counter(), state["step"]
            continue
        state.update(step=step + 1, tokens=(step + 1) * plan.tokens)
        state["optimizer_steps" if action == "go on" else "skipped_steps"] += 1
        frozen.applied(lr if action == "go on" else 0.0)
        state["epochs"] = mixture.epochs((batch + 1) * plan.sequences)
        last = step + 1 == total_steps
        watchdog.limit_s = recipe.health.hang_timeout_s

        # -- Log: the one host sync -------------------------------------------------------------------------------
        stands_still = False
        if (step + 1) % recipe.training.log_every_steps == 0 or last:
            beat("log")
            guard.read()
            report_spikes()
            stands_still = frozen.seen(fingerprint(engine))
            seconds = (time.perf_counter() - logged_at) / (step + 1 - logged_step)
            entry = {
                "step": step + 1,
                "tokens": state["tokens"],
                "loss": guard.take_mean(),
                "lr": lr,
                "grad_norm": float(engine.get_global_grad_norm()),
                "tokens_per_s": plan.tokens / seconds,
                "mfu": plan.tokens * flops / seconds / (peak * ranks),
                "step_time_s": seconds,
                "skipped_steps": state["skipped_steps"],
                "peak_memory_bytes": peak_memory_bytes(),
                "epochs": state["epochs"],
            }
            if metrics and monitors:
                metrics.write(entry)
                monitors.write("train", step + 1, entry)
            console.step(entry)
            logged_at, logged_step = time.perf_counter(), step + 1

        # -- Validate ---------------------------------------------------------------------------------------------
        if (step + 1) % recipe.validation.every_steps == 0 or last:
            windows = recipe.validation.max_sequences
            results = validate(engine, held_out, windows, text_bytes, micro=plan.micro, **forward)
            if metrics and monitors:
                metrics.write({"step": step + 1, "tokens": state["tokens"], "validation": results})
                monitors.write("validation", step + 1, results)
            for name, result in results.items():
                bits = result["bits_per_byte"]
                shown = (
                    "bits per byte unknown without a tokenizer.model" if bits is None else f"{bits:.4f} bits per byte"
                )
                console.print(f"step {step + 1}: validation {escape(name)}: loss {result['loss']:.4f}, {shown}")
            host_memory.trim()
            logged_at = time.perf_counter()

        # -- Evaluate ---------------------------------------------------------------------------------------------
        if evaluation and ((step + 1) % (recipe.evaluation.every_steps or total_steps) == 0 or last):
            scores = evaluation.run()
            if metrics and monitors:
                metrics.write({"step": step + 1, "tokens": state["tokens"], "evaluation": scores})
                monitors.write("evaluation", step + 1, scores)
            for name, score in scores.items():
                console.print(
                    f"step {step + 1}: {escape(name)}: {score['metric']} {score['value']:.4f} on {score['n']} items"
                )
            host_memory.trim()
            logged_at = time.perf_counter()

        # -- Stop, save: what one rank has met, all act on ----------------------------------------------------------
        beat("control")
        met = torch.tensor([bool(STOP.received), saver.failed, stands_still], dtype=torch.int32)
        dist.all_reduce(met, op=dist.ReduceOp.MAX, group=control)
        stopping, save_failed, stands_still = map(bool, met.tolist())
        if stands_still:
            raise UnhealthyRunError(
                f"step {step + 1}: the weights have not changed in {recipe.health.frozen_after_steps} steps, "
                f"health.frozen_after_steps; nothing was saved"
            )
        if save_failed:
            saver.wait()  # raises, on every rank
        if (step + 1) % recipe.checkpoint.every_steps == 0 or last or stopping:
            save()
            logged_at = time.perf_counter()
        if last or stopping:
            saver.wait()
        report_save()
        if stopping and not last:
            feed.close()
            console.close()
            report_profile()
            console.print(f"stopped by a signal after step {step + 1}; run the same command again to continue")
            return STOPPED_BY_SIGNAL
    if evaluation:
        evaluation.close()
    feed.close()
    saver.close()
    console.close()
    report_profile()
    console.print(f"done: {state['tokens']:,} tokens in {escape(str(output))}")
    return 0


def main(arguments: argparse.Namespace, beat: Heartbeat) -> int:
    """Run, and turn what can go wrong into an exit code and one red line from one rank."""
    try:
        return run(arguments, beat)
    except (UserError, UnhealthyRunError) as error:
        if beat.speaks():
            print_error(str(error))
        return 2 if isinstance(error, UserError) else UNHEALTHY
    except SaveError as error:
        if error.here:
            print_error(str(error))
        return SAVE_FAILED
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            print_error(f"no room to write in {arguments.output}: {error}")  # metrics, before a checkpoint met it
            return SAVE_FAILED
        if is_lost_connection(error) and (code := without_a_peer(error, beat)) is not None:
            return code
        traceback.print_exc()
        return 1


def is_lost_connection(error: BaseException) -> bool:
    """Whether an exchange between ranks failed because another is not there any more, as far as the text says."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in LOST_CONNECTION)


def without_a_peer(error: Exception, beat: Heartbeat) -> int | None:
    """The exit code of a rank whose exchange with the others failed: the reason that another gave, else that it is gone.

    None where there are no others.
    """
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks == 1:
        return None
    if beat.token:
        code = code_of_a_peer(beat.run, beat.rank, ranks, beat.token)
        if code is not None:
            return code
    else:
        time.sleep(GRACE_S)  # the launcher ends this rank meanwhile, if one of this machine has met a mistake
    stacks = stack_file(beat.run, beat.rank)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not stacks.exists():  # the watchdog has not said it
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        print_error(f"a rank is gone, here or on another machine ({lines[0][:200]}); run the same command again")
    if beat.token:
        with contextlib.suppress(OSError):
            stacks.parent.mkdir(exist_ok=True)
            with open(stacks, "a") as stream:
                traceback.print_exception(error, file=stream)
    return HUNG


def begin(beat: Heartbeat) -> None:
    """What ends this rank, from here on: a signal, the death of its launcher, the death of the launcher's own."""

    def last_words() -> None:
        if beat.token and beat.rank == 0:
            print_error(BEFORE)
        else:
            say()
        locks.give_back_all()
        beat.end(STOPPED_BY_SIGNAL)

    STOP.last_words = last_words
    if "RANK" in os.environ:  # started by a launcher
        processes.die_with_parent(os.getppid())
        for pid in launchers_above(Path(__file__).name):
            processes.watch(pid, lambda: STOP.note(signal.SIGHUP))


if __name__ == "__main__":
    given = parse_arguments()
    heartbeat = Heartbeat(Path(given.output), int(os.environ.get("RANK", 0)))
    begin(heartbeat)
    for name in ("stdout", "stderr"):
        setattr(sys, name, Lasting(getattr(sys, name)))
    code = main(given, heartbeat)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    heartbeat.end(code)
    locks.give_back_all()
    # Gloo's threads can abort a process that ends in order after its peers; everything is on disk by now.
    os._exit(code)
