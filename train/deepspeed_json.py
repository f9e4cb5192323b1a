"""A DeepSpeed JSON as it is read: each setting's kind and range, and what the recipe decides instead. Torch-free.

DeepSpeed ignores a misspelt section in silence, and refuses a wrong value inside one with a traceback after the launch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tinyllama import strict_json
from tinyllama.errors import ConfigError, nearest
from train.ranges import Flag, OneOf, Optional, Real, Rule, Text, Whole


@dataclasses.dataclass(frozen=True)
class Auto(Rule):
    """The same, or "auto": derived from the recipe, the ranks or the model."""

    rule: Rule

    def refusal(self, value: Any) -> str | None:
        refusal = None if value == "auto" else self.rule.refusal(value)
        return f'{refusal}, or "auto"' if refusal else None


@dataclasses.dataclass(frozen=True)
class Anything(Rule):
    """What DeepSpeed alone understands."""

    def refusal(self, value: Any) -> str | None:
        return None


@dataclasses.dataclass(frozen=True)
class Texts(Rule):
    """A list of names: of these, where there are any."""

    names: tuple[str, ...] = ()

    def refusal(self, value: Any) -> str | None:
        rule = OneOf(self.names) if self.names else Text()
        good = isinstance(value, list) and all(rule.refusal(entry) is None for entry in value)
        return None if good else f"give a list of {', '.join(self.names) or 'names'}"


Section = dict[str, "Rule | Section"]

FLAG, TEXT, COUNT, SHARE = Flag(), Text(), Whole(0, 1 << 62), Real(0, 1)
FLAGS = dict.fromkeys(("enabled", "immediate_grad_update", "check_grad_overflow"), FLAG)
DEVICE = OneOf(("none", "cpu", "nvme"))
FILES: Section = {"enabled": FLAG, "output_path": TEXT, "job_name": TEXT}

ZERO: Section = {
    "stage": OneOf((1, 2, 3)),
    **dict.fromkeys(
        (
            *("contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce", "allgather_partitions"),
            *("load_from_fp32_weights", "stage3_gather_16bit_weights_on_model_save"),
            *("stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "ignore_unused_parameters"),
            *("round_robin_gradients", "parameter_alignment", "zero_quantized_weights", "zero_quantized_gradients"),
            *("memory_efficient_linear", "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks"),
        ),
        FLAG,
    ),
    "overlap_comm": Optional(FLAG),
    "reduce_bucket_size": Auto(Whole(1, 1 << 62)),
    "allgather_bucket_size": Auto(Whole(1, 1 << 62)),
    "sub_group_size": Whole(1, 1 << 62),
    "stage3_prefetch_bucket_size": Auto(COUNT),
    "stage3_param_persistence_threshold": Auto(COUNT),
    "stage3_model_persistence_threshold": COUNT,
    "stage3_max_live_parameters": COUNT,
    "stage3_max_reuse_distance": COUNT,
    "stage3_module_granularity_threshold": COUNT,
    "zero_hpz_partition_size": Auto(Whole(1, 1 << 20)),
    "offload_param": {
        "device": DEVICE,
        "nvme_path": Optional(TEXT),
        "buffer_count": Whole(1, 1 << 20),
        "buffer_size": COUNT,
        "max_in_cpu": COUNT,
        "pin_memory": FLAG,
    },
    "offload_optimizer": {
        "device": DEVICE,
        "nvme_path": Optional(TEXT),
        "buffer_count": Whole(1, 1 << 20),
        "ratio": SHARE,
        "cpuadam_cores_perc": SHARE,
        **dict.fromkeys(("pin_memory", "pipeline_read", "pipeline_write", "fast_init", "super_offload"), FLAG),
    },
    "zenflow": {
        "topk_ratio": Real(0, 1, "()"),
        "select_strategy": OneOf(("auto", "step", "epoch")),
        **dict.fromkeys(("select_interval", "update_interval"), Auto(Whole(1, 10**9))),
        **dict.fromkeys(("overlap_step", "offload"), FLAG),
        **dict.fromkeys(("auto_ratio", "pt_reserved_cores_perc"), SHARE),
        "full_warm_up_rounds": COUNT,
        "steps_per_epoch": Optional(COUNT),
    },
    "leaf_module": dict.fromkeys(("classes", "names", "name_suffixes"), Texts()),
}
# Of DeepSpeed's own ZeRO settings those that a run here has no use for, or that would change what it reports.
UNUSED_ZERO = (
    *("elastic_checkpoint", "cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory", "legacy_stage1"),
    *("stage3_gather_fp16_weights_on_model_save", "pipeline_loading_checkpoint", "compute_grad_norm"),
    *("zero_quantized_nontrainable_weights", "save_muon_momentum_buffer_in_memory"),
)
DEEPSPEED: Section = {
    "train_batch_size": Auto(Whole(1, 1 << 40)),
    "train_micro_batch_size_per_gpu": Auto(Whole(1, 1 << 20)),
    "gradient_accumulation_steps": Auto(Whole(1, 1 << 40)),
    "gradient_clipping": Auto(Real(0, 1e6)),
    "bf16": {**FLAGS, "bf16_master_weights_and_grads": FLAG, "bf16_optimizer_states": FLAG},
    "data_types": {"grad_accum_dtype": OneOf(("fp32", "bf16"))},
    "zero_optimization": ZERO,
    "communication_data_type": Optional(OneOf(("fp32", "bf16", "fp16"))),
    "gradient_predivide_factor": Real(0, 1e6, "(]"),
    "compile": {
        **dict.fromkeys(
            (
                *("deepcompile", "autoep_non_moe", "free_activation", "offload_activation", "offload_opt_states"),
                *("offload_activation_pin_memory", "double_buffer", "symmetric_memory", "debug_log"),
                *("offload_parameters", "sync_before_reduce", "sync_after_reduce", "sync_before_allgather"),
                *("sync_after_allgather", "keep_int_input_tensors", "keep_all_input_tensors"),
            ),
            FLAG,
        ),
        "free_activation_threshold": COUNT,
        "passes": Optional(Texts(("z1", "z3", "autosp", "autotp"))),
    },
    "aio": {
        "block_size": Whole(1, 1 << 40),
        "queue_depth": Whole(1, 1 << 20),
        "intra_op_parallelism": Whole(1, 1 << 12),
        **dict.fromkeys(("single_submit", "overlap_events", "use_gds"), FLAG),
    },
    "tensorboard": FILES,
    "csv_monitor": FILES,
    "wandb": {"enabled": FLAG, "project": TEXT, "group": Optional(TEXT), "team": Optional(TEXT)},
    "comet": {
        "enabled": FLAG,
        "samples_log_interval": Whole(1, 10**9),
        "online": Optional(FLAG),
        "api_key": Anything(),  # refused with its reason where monitors are made
        **dict.fromkeys(("project", "workspace", "experiment_name", "experiment_key", "mode"), Optional(TEXT)),
    },
    "comms_logger": {**dict.fromkeys(("enabled", "prof_all", "verbose", "debug"), FLAG), "prof_ops": Texts()},
    "flops_profiler": {
        "enabled": FLAG,
        "recompute_fwd_factor": Real(0, 10),
        "profile_step": Whole(1, 10**9),
        "module_depth": Whole(-1, 1000),
        "top_modules": Whole(1, 1000),
        "detailed": FLAG,
        "output_file": Optional(TEXT),
    },
    "timers": {"throughput": {"enabled": FLAG, "synchronized": FLAG}},
    "log_level": OneOf(("debug", "info", "warning", "error", "critical")),
    "steps_per_print": Optional(Whole(1, 1 << 62)),
    **dict.fromkeys(
        (
            *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "prescale_gradients"),
            *("wall_clock_breakdown", "memory_breakdown", "dump_state", "disable_python_gc"),
        ),
        FLAG,
    ),
}


def read_deepspeed(path: str | Path) -> dict[str, Any]:
    """A DeepSpeed JSON, refused where it says what the recipe decides, or what DeepSpeed would not take."""
    config = strict_json.read_object(Path(path), "DeepSpeed JSON", missing="use ds_configs/zero3.json")
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise ConfigError(f"{path}: section {section!r}", fix="the recipe's optimizer section says this; remove it")
    for half in ("fp16", "amp", "torch_autocast"):
        if isinstance(off := config.get(half), dict) and off.get("enabled", False) is False:
            del config[half]
        elif half in config:
            raise ConfigError(f"{path}: section {half!r}", fix="training is in bf16, or in fp32 without it; remove it")
    zero = config.get("zero_optimization", {})
    for name in ("offload_param", "offload_optimizer", "zenflow"):
        if isinstance(zero, dict) and zero.get(name, ()) is None:  # DeepSpeed's way to say that there is none
            del zero[name]
    _check(config, DEEPSPEED, str(path))
    if "stage" not in zero:
        raise ConfigError(
            f"{path}: zero_optimization.stage is not given", fix="give 1, 2 or 3; stage 1 on one rank is plain"
        )
    for name in ("offload_param", "offload_optimizer"):
        device = zero.get(name, {}).get("device", "none")
        if device == "none":
            zero.pop(name, None)
        if device == "nvme" and not zero[name].get("nvme_path"):
            raise ConfigError(f"{path}: {name}.device=nvme without nvme_path", fix="give the folder to offload to")
    if zero["stage"] != 3 and ("offload_param" in zero or zero.get("zero_hpz_partition_size", 1) not in (1, "auto")):
        raise ConfigError(
            f"{path}: offload_param and zero_hpz_partition_size are of stage 3, this is stage {zero['stage']}",
            fix="remove them, or give stage 3",
        )
    return config


def _check(config: dict[str, Any], rules: Section, path: str, inside: str = "") -> None:
    for key, value in config.items():
        name = f"{inside}.{key}" if inside else key
        rule = rules.get(key)
        if rule is None:
            raise ConfigError(f"{path}: {name!r} is not a setting for this training", fix=nearest(key, list(rules)))
        if isinstance(rule, dict):
            if not isinstance(value, dict):
                raise ConfigError(f"{path}: {name}={value!r} is not a JSON object", fix="give an object, or remove it")
            _check(value, rule, path, name)
            continue
        inner = rule.rule if isinstance(rule, Auto | Optional) else rule
        if isinstance(inner, Whole) and isinstance(value, float) and value.is_integer():
            value = config[key] = int(value)  # DeepSpeed's own examples write 5e8
        if refusal := rule.refusal(value):
            raise ConfigError(f"{path}: {name}={value!r}", fix=refusal)
