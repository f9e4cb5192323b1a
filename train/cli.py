"""`tinyllama train`: checks everything that needs no launch, shows the plan, then calls the DeepSpeed launcher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinyllama import hardware

if TYPE_CHECKING:
    from train.nodes import Nodes
    from train.recipe import Recipe

CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"


def train_command(
    context: typer.Context,
    recipe: Annotated[str | None, typer.Option(help="What to train: a JSON file, or the name of one shipped.")] = None,
    deepspeed: Annotated[
        str, typer.Option(help="How to run it: a DeepSpeed JSON, or the name of one shipped.")
    ] = "zero3",
    data: Annotated[Path, typer.Option(help="Folder of the recipe's token stores.")] = Path("data"),
    output: Annotated[Path, typer.Option("--output", "-o", help="Run directory.")] = Path("runs/pretrain"),
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.model; default: the one in --data.")] = None,
    any_tokenizer: Annotated[
        bool, typer.Option("--any-tokenizer", help="Train with a tokenizer that export and eval will refuse.")
    ] = False,
    resume: Annotated[str, typer.Option(help="auto, never or must.")] = "auto",
    init_from: Annotated[
        Path | None, typer.Option(help="Start from these weights: a Hugging Face Llama directory, or a checkpoint.")
    ] = None,
    allow_rate_jump: Annotated[
        bool, typer.Option("--allow-rate-jump", help="Resume though the learning rate jumps up where the run goes on.")
    ] = False,
    setting: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override the recipe.")] = [],  # noqa: B006
    eval_every: Annotated[
        int | None, typer.Option(help="Score the model by the recipe's lm-eval tasks every so many steps.")
    ] = None,
    num_accelerators: Annotated[
        int | None, typer.Option(help="Ranks on this machine; default: its GPUs, or 1.")
    ] = None,
    nodes: Annotated[int, typer.Option(help="Machines; run the same command on each. Under srun, Slurm says it.")] = 1,
    node_rank: Annotated[int | None, typer.Option(help="Which machine this is, from 0.")] = None,
    master: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where machine 0 can be reached.")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="DeepSpeed hostfile: several machines, through ssh.")] = None,
    launcher: Annotated[str, typer.Option(help="Further arguments of the DeepSpeed launcher, as one string.")] = "",
    profile: Annotated[
        str | None, typer.Option(metavar="FIRST:COUNT", help="Profile COUNT steps after FIRST others: RUN/profile.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show batch, memory, traffic, epochs and days; launch nothing.")
    ] = False,
    device: Annotated[str, typer.Option(help=f"Dry run: {', '.join(hardware.NAMES)}.")] = "H100",
    mfu: Annotated[float, typer.Option(help="Dry run: share of the device's peak to assume.")] = 0.4,
    gigabytes_per_s: Annotated[float, typer.Option(help="Dry run: what one rank can send to assume.")] = 50.0,
    as_json: Annotated[bool, typer.Option("--json", help="Dry run: print as JSON.")] = False,
    inject: Annotated[str, typer.Option(hidden=True, help="Faults, for tests: see train/injection.py.")] = "",
) -> None:
    """Pretrain under DeepSpeed. Run the same command again to continue from the last checkpoint.

    Exit code 75: stopped by a signal, after saving; 76: a rank hung or died. Both: run the same command again.
    One run at a time in a directory: a second command there ends with 2.
    70: the run is unhealthy; 74: a checkpoint could not be written.

    [bold]Examples[/]

      tinyllama train --data data --output runs/1b

      tinyllama train --recipe tinyllama_120m --num-accelerators 2 --set training.tokens=1e9 --output runs/120m

      tinyllama train --init-from TinyLlama-1.1B-intermediate-step-1431k-3T --set optimizer.lr=1e-4 --output runs/more

      tinyllama train --dry-run --num-accelerators 64 --device A100-40G --deepspeed zero1

      tinyllama train --nodes 2 --node-rank 0 --master 10.0.0.1:29500 --output /shared/1b

      tinyllama train --hostfile hosts --deepspeed my_zero3.json --launcher "--master_port 29600"
    """
    import os
    import shlex
    import sys

    from rich.console import Console

    from tinyllama import locks
    from tinyllama.errors import ConfigError
    from train import accelerators, before_launch, profiling
    from train import launch as launching
    from train import nodes as machines
    from train import plan as planning
    from train.metrics import take_monitors
    from train.nodes import Nodes
    from train.recipe import load_recipe
    from train.schedule import describe as describe_schedule
    from train.terminal import Lasting

    if eval_every is not None:
        setting = [*setting, f"evaluation.every_steps={eval_every}"]
    if not dry_run:
        launching.launcher()  # the missing extra, if it is, before anything else
    if resume not in ("auto", "never", "must"):
        raise ConfigError(f"--resume {resume}", fix="give auto, never or must")
    if profile is not None:
        profiling.parse(profile)
    for option, value in (("--num-accelerators", num_accelerators), ("--nodes", nodes)):
        if value is not None and not 1 <= value <= 1_000_000:
            raise ConfigError(f"{option} {value}", fix="give a number from 1 to 1,000,000")
    try:
        further = shlex.split(launcher)
    except ValueError as error:
        raise ConfigError(f"--launcher {launcher!r}: {error}", fix="close what is quoted") from None
    hosts = machines.read_hostfile(hostfile) if hostfile else {}
    if hosts and (nodes > 1 or node_rank is not None or master is not None):
        raise ConfigError("--nodes and --hostfile both name the machines", fix="give one of them")
    config = Path(deepspeed)
    if not os.path.exists(config) and os.path.exists(CONFIGS / f"{config.name}.json"):
        config = CONFIGS / f"{config.name}.json"
    wanted = load_recipe(recipe, setting)
    raw = planning.read_deepspeed(config)
    take_monitors(raw, output)
    before_launch.check_output(output)
    before_launch.check_precision(wanted, raw, here=not dry_run)
    if dry_run:
        import json

        from train.dry_run import describe, show

        each = num_accelerators or max(hosts.values(), default=1)
        in_all = sum(min(each, slots) for slots in hosts.values()) if hosts else each * nodes
        if node_rank is not None or master is not None:
            machines.given(nodes, node_rank, master, each)
        found = describe(wanted, raw, data, in_all, device, mfu, gigabytes_per_s, each, tokenizer)
        rate_changes = check_start(wanted, output, resume, found.pop("mixture_sha256"), init_from, allow_rate_jump)
        if not any_tokenizer:
            check_tokenizer(output, resume, tokenizer or data / "tokenizer.model")
        found["notes"] = [rate_changes] if rate_changes else []
        print(json.dumps(found)) if as_json else show(found)
        return
    several = find_nodes(nodes, node_rank, master, num_accelerators)
    if several and hostfile:  # under srun
        raise ConfigError("--nodes and --hostfile both name the machines", fix="give one of them")
    if hostfile is None:
        num_accelerators = several.accelerators if several else num_accelerators
        if num_accelerators is None and not launcher:
            num_accelerators = max(1, accelerators.count_gpus())
        if num_accelerators is not None:
            accelerators.refuse_too_many(num_accelerators, accelerators.count_gpus())
    ranks = several.ranks if several else num_accelerators
    if ranks is not None and hostfile is None:
        planning.resolve_deepspeed(raw, wanted, ranks)
    # From here on nobody else writes the run directory, which every rank will.
    job = "tinyllama train" + (f" --master {several.master}:{several.port}" if several else "")
    lock = None
    if several is None or several.rank == 0:
        lock = context.with_resource(locks.held(locks.inside(output), output, job))
    else:
        locks.refuse_another(locks.inside(output), output, job)
    mixture = before_launch.check_data(wanted, data, tokenizer)
    rate_changes = check_start(wanted, output, resume, mixture.sha256, init_from, allow_rate_jump)
    if not any_tokenizer:
        check_tokenizer(output, resume, tokenizer or data / "tokenizer.model")
    console = Console(highlight=False, quiet=several is not None and several.rank > 0)
    steps, batch = wanted.num_steps, wanted.training.batch_tokens
    console.print(f"{wanted.model.num_parameters:,} parameters on {wanted.training.tokens:,} tokens, {steps:,} steps")
    for name, epochs in mixture.epochs(steps * (batch // wanted.data.sequence_length)).items():
        console.print(f"  {name}: {epochs:.3f} epochs", markup=False)
    console.print(describe_schedule(wanted), markup=False)
    if rate_changes:
        console.print(rate_changes, style="yellow", markup=False)

    script = ["--deepspeed", str(config), "--data", str(data), "--output", str(output), "--resume", resume]
    script += [] if recipe is None else ["--recipe", recipe]
    script += ["--init-from", str(init_from)] if init_from else []
    script += ["--allow-rate-jump"] if allow_rate_jump else []
    script += ["--inject", inject] if inject else []
    script += ["--profile", profile] if profile is not None else []
    script += ["--tokenizer", str(tokenizer)] if tokenizer else []
    script += [argument for entry in setting for argument in ("--set", entry)]
    if several:
        command = [*launching.node_command(several), *further]
    elif num_accelerators and not hostfile and not launcher:
        command = launching.node_command(Nodes(1, 0, "127.0.0.1", launching.free_port(), num_accelerators))
    else:
        arguments = ["--hostfile", str(hostfile)] if hostfile else []
        arguments += ["--num_accelerators", str(num_accelerators)] if num_accelerators else []
        command = launching.runner_command([*further, *arguments])
    for name in ("stdout", "stderr"):
        setattr(sys, name, Lasting(getattr(sys, name)))
    sys.exit(launching.launch(command, script, output, lock))


def check_tokenizer(output: Path, resume: str, tokenizer: Path) -> None:
    """UserError if a run that begins would train a model that cannot be exported."""
    from tinyllama import checkpoint
    from tinyllama.tokenizer.export import refuse_unexportable

    if tokenizer.exists() and (resume == "never" or not checkpoint.list_checkpoints(output)):
        refuse_unexportable(tokenizer, "--any-tokenizer")


def check_start(
    recipe: Recipe, output: Path, resume: str, mixture_sha256: str | None, init_from: Path | None, allow_jump: bool
) -> str | None:
    """Refuse the checkpoint or the weights that a run cannot go on from; one line where the rate changes with it.

    The run itself compares every byte of a checkpoint as well, and goes on from an older one where a shard is damaged.
    """
    from tinyllama import checkpoint
    from train import before_launch, start

    found = before_launch.choose_checkpoint(output, resume, checkpoint.inspect)
    if found is None:
        if init_from:
            start.check(init_from, recipe.model)
        return None
    return before_launch.check_resume(found, recipe, mixture_sha256, init_from, allow_jump)


def find_nodes(nodes: int, node_rank: int | None, master: str | None, num_accelerators: int | None) -> Nodes | None:
    """The machines that take part, from the command line or from Slurm; None for this one alone."""
    import os

    from train import accelerators
    from train import nodes as machines

    if nodes == 1 and node_rank is None and master is None and machines.slurm_nodes(os.environ) == 1:
        return None
    each = num_accelerators if num_accelerators is not None else max(1, accelerators.count_gpus())
    if nodes == 1 and node_rank is None and master is None:
        return machines.from_slurm(os.environ, each)
    return machines.given(nodes, node_rank, master, each)
