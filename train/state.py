"""The state of a DeepSpeed engine: the slices of weights and moments that each rank holds, and a checkpoint put back.

The format is `tinyllama.checkpoint`'s, so any number of ranks and any ZeRO stage can resume, and no DeepSpeed is needed to
export. What an engine holds of a fused parameter is given, and taken, as slices of Hugging Face's (`fused.py`). Under stage
3 DeepSpeed's documented accessors give the local part of a parameter. Under stages 1 and 2 there are accessors for whole
tensors alone, which move every tensor to every rank: there the fragment is taken that they use.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import subprocess
from collections.abc import Callable, Iterable, Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama import checkpoint
from tinyllama.errors import CheckpointError
from tinyllama.model import fused
from tinyllama.model.config import ModelConfig
from train.recipe import DataConfig, Recipe

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import Tensor
    from torch.nn import Parameter


def versions() -> dict[str, str]:
    """Versions of what decides the numbers of a run."""
    names = ("tinyllama", "torch", "deepspeed", "transformers", "sentencepiece", "safetensors", "numpy")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> dict[str, Any]:
    """The git commit of the working directory, and whether files differ from it; empty outside of a repository."""
    found = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", *command], capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return {}
        if done.returncode:
            return {}
        found.append(done.stdout.strip())
    return {"commit": found[0], "dirty": bool(found[1])}


def _local_range(numel: int, rank: int, ranks: int) -> tuple[int, int]:
    """The elements of a flattened parameter that ZeRO-3 keeps on `rank`: equal parts, the last ones padded."""
    part = -(-numel // ranks)
    return min(numel, rank * part), min(numel, (rank + 1) * part)


def local_slices(engine: DeepSpeedEngine) -> Iterator[tuple[str, int, int, dict[str, Tensor]]]:
    """This rank's slice [start, stop) of each flattened parameter, as Hugging Face names them: its fp32 weights and moments.

    Views of what the engine holds, flat; copies where that is offloaded.
    """
    for ours, first, last, held in _held_slices(engine):
        position = 0
        for name, start, stop in fused.split_slice(ours, first, last, engine.module.config):
            end = position + stop - start
            yield name, start, stop, {kind: tensor.flatten()[position:end] for kind, tensor in held.items()}
            position = end


def _held_slices(engine: DeepSpeedEngine) -> Iterator[tuple[str, int, int, dict[str, Tensor]]]:
    """The same of our own parameters, whose tensors may be padded at the end."""
    import torch.distributed as dist
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    rank, ranks, stage = dist.get_rank(), dist.get_world_size(), engine.zero_optimization_stage()
    if stage != 3:
        # DeepSpeed links moments to fragments once, after the step of the first group alone: the others would have none.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        if stage == 3:
            start, stop = _local_range(parameter.ds_numel, rank, ranks)
            if start == stop:
                continue
            local = {checkpoint.WEIGHT: safe_get_local_fp32_param(parameter)}
            for moment in checkpoint.MOMENTS:
                local[moment] = safe_get_local_optimizer_state(parameter, moment)
        else:
            mapping = parameter._hp_mapping  # None where another rank has all of it
            if mapping is None:
                continue
            start = mapping.lp_fragment_address.start
            stop = start + mapping.lp_fragment_address.numel
            local = {checkpoint.WEIGHT: mapping.get_hp_fragment()}
            for moment in checkpoint.MOMENTS:
                local[moment] = mapping.get_hp_fragment(optim_state_key=moment)
        yield name, start, stop, local


# What may change when a run goes on: it moves no token of the data's order, and no weight. All else of the sections model
# and data, the batch, and the stores' content, must stay.
FREE_ON_RESUME = ("data.max_epochs", "data.sources.store")


def refuse_other_run(old: dict[str, Any], recipe: Recipe, mixture_sha256: str | None, where: Path) -> None:
    """A resume must continue the same model on the same data in the same order; shows the first difference.

    A field that the checkpoint lacks, of an older release, has its default. mixture_sha256: not compared when None.
    """
    new, default = recipe.to_dict(), dataclasses.asdict(DataConfig())
    defaults = {"model": ModelConfig().to_dict(), "data": json.loads(json.dumps(default))}
    for key in ("model", "data"):
        before, now = _kept({**defaults[key], **old["recipe"].get(key, {})}, key), _kept(new[key], key)
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                raise CheckpointError(
                    f"{where} was trained with {key}.{name}={before.get(name)!r}, this recipe says {now.get(name)!r}",
                    fix="use the same recipe, or --resume never with another --output",
                )
    batch = old["recipe"].get("training", {}).get("batch_tokens")
    if batch != new["training"]["batch_tokens"]:
        raise CheckpointError(
            f"{where} was trained with training.batch_tokens={batch}, this recipe says {new['training']['batch_tokens']}",
            fix="keep the batch, or --resume never with another --output",
        )
    if mixture_sha256 is not None and old["mixture_sha256"] != mixture_sha256:
        raise CheckpointError(
            f"{where} was trained on other data: the stores' checksums differ",
            fix="give the same --data, or --resume never with another --output",
        )


def _kept(section: dict[str, Any], name: str) -> dict[str, Any]:
    """What of a recipe's section must stay, by its name; of the sources' fields too."""
    found = {key: value for key, value in section.items() if f"{name}.{key}" not in FREE_ON_RESUME}
    if "sources" in found:
        found["sources"] = [
            {key: value for key, value in entry.items() if f"data.sources.{key}" not in FREE_ON_RESUME}
            for entry in found["sources"]
        ]
    return found


def load_weights(engine: DeepSpeedEngine, directory: Path) -> None:
    """Put a checkpoint's weights into the low-precision copy of an engine that has already trained; collective."""
    import deepspeed
    import torch
    import torch.distributed as dist

    parameters = dict(engine.module.named_parameters())
    for name, tensor in fused.join(checkpoint.read_weights(directory), engine.module.config):
        parameter = parameters[name]
        if engine.zero_optimization_stage() == 3:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if dist.get_rank() == 0:
                    parameter.data.copy_(tensor)
        else:
            with torch.no_grad():
                parameter.copy_(tensor)


def load_optimizer(engine: DeepSpeedEngine, directory: Path, optimizer_steps: int) -> None:
    """Fill the fp32 master weights and Adam's moments of this rank from a checkpoint; collective-free.

    The model's weights must have been loaded before DeepSpeed wrapped it: they give the low-precision copy.
    """
    import torch

    zero = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 3:
        flat_groups = zero.fp32_partitioned_groups_flat
    elif hasattr(zero, "single_partition_of_fp32_groups"):
        flat_groups = zero.single_partition_of_fp32_groups
    else:
        flat_groups = zero.fp32_groups_flat_partition  # stage 1 in bf16 has an optimizer of its own
    for flat in flat_groups:
        zero.optimizer.state[flat] = {
            "step": torch.tensor(float(optimizer_steps), device=flat.device),
            **{moment: torch.zeros_like(flat) for moment in checkpoint.MOMENTS},
        }
    slices = checkpoint.Slices(directory)
    if stage == 3:
        _fill_stage3(engine, slices)
        return
    for name, start, stop, local in local_slices(engine):
        for kind, tensor in local.items():
            tensor.data.copy_(slices.read(kind, name, start, stop))


def _fill_stage3(engine: DeepSpeedEngine, slices: checkpoint.Slices) -> None:
    import torch

    def read(name: str, kind: str, wanted: slice) -> Tensor:
        found = fused.split_slice(name, wanted.start, wanted.stop, engine.module.config)
        return torch.cat([slices.read(kind, *piece) for piece in found])

    for name, parameter in engine.module.named_parameters():
        for kind in (checkpoint.WEIGHT, *checkpoint.MOMENTS):
            _set_local(parameter, kind, functools.partial(read, name, kind))


def _set_local(parameter: Parameter, kind: str, read: Callable[[slice], Tensor]) -> None:
    """Give ZeRO-3's part of a weight or moment on this rank what `read(slice)` has for it."""
    import torch
    import torch.distributed as dist
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    start, stop = _local_range(prod(parameter.ds_shape), dist.get_rank(), dist.get_world_size())
    local = torch.zeros(parameter.ds_tensor.numel(), device=parameter.ds_tensor.device)
    if start < stop:
        local[: stop - start] = read(slice(start, stop))
    if kind == checkpoint.WEIGHT:
        safe_set_local_fp32_param(parameter, local)
    else:
        safe_set_local_optimizer_state(parameter, local, kind)


def load_masters(engine: DeepSpeedEngine, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Give a new engine's fp32 master weights these values, which DeepSpeed has rounded to the model's precision."""
    parameters = dict(engine.module.named_parameters())
    for name, tensor in fused.join(tensors, engine.module.config):
        if name not in parameters:
            continue
        parameter, flat = parameters[name], tensor.reshape(-1).float()
        if engine.zero_optimization_stage() == 3:
            _set_local(parameter, checkpoint.WEIGHT, flat.__getitem__)
        elif (mapping := parameter._hp_mapping) is not None:
            start = mapping.lp_fragment_address.start
            mapping.get_hp_fragment().data.copy_(flat[start : start + mapping.lp_fragment_address.numel])
