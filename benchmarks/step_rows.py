"""The ways to make a training step that the benchmarks compare: whose model, under which DeepSpeed stage, compiled how.

`train_step.py` measures them beside one another, `gpu_day/step.py` on a GPU.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

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


def on_device(config: ModelConfig, device: Any, seed: int = 1) -> Any:
    """Our model in float32 with random weights drawn by the device itself: a billion of them take a CPU a quarter minute."""
    import torch

    from tinyllama.model.llama import Llama

    with torch.device("meta"):
        model = Llama(config)
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, config.initializer_range, generator=generator)
    return model


def build(row: Row, config: ModelConfig, device: Any) -> Any:
    """A module that takes ids and targets (B, T) and gives the summed loss. Ours is made where it computes, on a GPU."""
    import torch

    if row.model == "ours":
        from tinyllama.model.kernels import Setting, choose
        from tinyllama.model.llama import Llama

        if device.type == "cpu":
            model = Llama(config)
            model.initialize(1)
        else:
            model = on_device(config, device)
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
    """DeepSpeed's engine on the shipped JSON, its gradients summed as train/pretrain.py does.

    shape: our model's, where its sizes shall decide DeepSpeed's. free_bytes: of the GPU; None on a CPU.
    """

    def __init__(
        self,
        model: Any,
        row: Row,
        accumulation: int,
        micro: int,
        length: int,
        shape: ModelConfig | None = None,
        free_bytes: int | None = None,
    ) -> None:
        import deepspeed
        import torch

        from train.accumulation import Accumulation
        from train.distributed import init_distributed
        from train.plan import read_deepspeed, resolve_deepspeed
        from train.recipe import Recipe

        config = read_deepspeed(ROOT / "ds_configs" / f"zero{row.stage}.json")
        recipe = Recipe.from_dict(
            {
                "model": shape.to_dict() if shape else {"max_position_embeddings": max(2048, length)},
                "data": {"sequence_length": length},
                "training": {"batch_tokens": accumulation * micro * length, "micro_batch_sequences": micro},
            }
        )
        resolved, plan = resolve_deepspeed(config, recipe, 1, free_bytes=free_bytes)
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
        self.reduce_once = plan.reduce_once
        self.gradients = Accumulation(self.engine, plan.reduce_once)

    def divide(self, micro: int, accumulation: int) -> None:
        """Another division of the step's batch from now on."""
        self.engine.set_train_micro_batch_size(micro)
        self.engine.set_train_batch_size(micro * accumulation)

    def step(self, micro_batches: list[tuple[Any, Any]], scale: float) -> None:
        with self.gradients.step():
            for ids, targets in micro_batches:
                # DeepSpeed divides by the accumulation
                self.engine.backward(self.engine(ids, targets) * (scale * len(micro_batches)))
                self.gradients.added()


def be_one_rank(kind: str) -> None:
    """The environment of a process that is DeepSpeed's only rank. kind: of device, "cpu" or "cuda"."""
    port = str(20000 + os.getpid() % 20000)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ["LOCAL_SIZE"] = "1"  # as DeepSpeed's launcher; without it, a process is started at each reduction
    os.environ.setdefault("DS_ACCELERATOR", kind)


def random_batches(vocab_size: int, accumulation: int, micro: int, length: int, device: Any) -> list[tuple[Any, Any]]:
    """Random ids and targets (micro, length) of one optimizer step."""
    import torch

    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, vocab_size, (accumulation, micro, length + 1), generator=generator).to(device)
    return [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in tokens]
