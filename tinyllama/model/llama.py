"""The decoder itself, in one file: RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

State dicts have Hugging Face's names (`model.layers.N.self_attn.q_proj.weight`), so that export is a save and not a
translation; query, key and value are computed by one product, as are gate and up, and `fused.py` splits and joins their
weights. What is worth a kernel of its own is called through `Kernels`. Knows nothing of DeepSpeed, data or files.
"""

# Shapes: B batch, T positions in this call, S positions attended to (T, or past + T with a cache), H query heads,
# K key/value heads, D width of a head, C hidden size, F feed-forward size, V vocabulary.

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinyllama.model import fused, ops
from tinyllama.model.config import ModelConfig
from tinyllama.model.kernels import PLAIN, Documents, Kernels
from tinyllama.model.ops import IGNORE_INDEX as IGNORE_INDEX  # part of this module's interface


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32 whatever the input's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.kernels = PLAIN

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.norm(x, self.weight, self.eps)


class Cache(Protocol):
    """What the decoder asks of a cache: `KVCache`, or another that keeps keys and values in its own way."""

    length: int

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor: ...

    def advance(self, tokens: int) -> None: ...


class KVCache:
    """Keys and values of the positions seen so far, for generation. Fixed capacity, filled from the left.

    keys, values: per layer (B, K, capacity, D). `length` is the number of positions filled.
    """

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.length = 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Keep k and v (B, K, T, D) of a layer; attention of q (B, H, T, D) over all that is kept: (B, T, H * D)."""
        end = self.length + q.shape[2]
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return ops.sdpa(q, self.keys[layer][:, :, :end], self.values[layer][:, :, :end], mask)

    def advance(self, tokens: int) -> None:
        """Every layer has seen `tokens` more positions."""
        self.length += tokens


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32, of shape positions.shape + (D,); half-split layout as in Hugging Face's Llama.

    Always fp32: TinyLlama's bf16 tables lose the exact position beyond a few hundred tokens.
    """
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim)
    angles = positions.float().unsqueeze(-1) * inverse  # (..., D/2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.kernels = PLAIN
        hidden = config.hidden_size
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self.qkv_proj = nn.Linear(hidden, config.head_dim * sum(self.heads), bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        fused.use_hf_state(self, config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        layer: int = 0,
        documents: Documents | None = None,
    ) -> Tensor:
        b, t, _ = x.shape
        head_dim = self.config.head_dim
        q, k, v = self.qkv_proj(x).view(b, t, -1, head_dim).split(self.heads, 2)
        # A copy of the values alone: as a view they would keep all three in memory until the backward pass.
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.contiguous().transpose(1, 2)  # (B, H or K, T, D)
        q, k = self.kernels.rotary(q, k, cos, sin)
        if cache is not None:
            return self.o_proj(cache.attend(layer, q, k, v, mask))
        if documents is not None:
            return self.o_proj(self.kernels.attention(q, k, v, documents))
        if mask is None and torch.is_grad_enabled():
            return self.o_proj(self.kernels.attention(q, k, v))
        return self.o_proj(ops.sdpa(q, k, v, mask))


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x)) (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kernels = PLAIN
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        fused.use_hf_state(self, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.kernels.swiglu(self.gate_up_proj(x)))


class Block(nn.Module):
    """One decoder layer: attention and feed-forward, each behind its norm, each added to the residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.compiled: Callable[..., Tensor] | None = None

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        layer: int = 0,
        documents: Documents | None = None,
    ) -> Tensor:
        if self.compiled is not None and mask is None and cache is None and torch.is_grad_enabled():
            return self.compiled(x, cos, sin, documents=documents)
        return self.compute(x, cos, sin, mask, cache, layer, documents)

    def compute(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        layer: int = 0,
        documents: Documents | None = None,
    ) -> Tensor:
        """The layer itself, without the choice between it and its compiled form."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, layer, documents)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and the last norm: token ids to hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        past = cache.length if cache is not None else 0
        x = self.embed_tokens(ids)  # (B, T, C)
        if positions is None:
            positions = torch.arange(past, past + ids.shape[1], device=ids.device).unsqueeze(0)
        cos, sin = rotary_tables(positions, self.config.head_dim, self.config.rope_theta)  # (B or 1, T, D)
        cos, sin = cos.unsqueeze(1).to(x.dtype), sin.unsqueeze(1).to(x.dtype)  # (B or 1, 1, T, D)
        if mask is None and past:
            # Query i sits at position past + i and sees every key up to itself.
            query = torch.arange(past, past + ids.shape[1], device=ids.device)
            mask = query[:, None] >= torch.arange(past + ids.shape[1], device=ids.device)[None, :]  # (T, S)
        for index, layer in enumerate(self.layers):
            if self.activation_checkpointing and self.training:
                x = checkpoint(layer, x, cos, sin, mask, cache, index, documents, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, cache, index, documents)
        if cache is not None:
            cache.advance(ids.shape[1])
        return self.norm(x)


class Head(nn.Linear):
    """The output layer: logits, or the summed loss, so that its weight is needed in this module's pass alone."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        self.kernels = PLAIN

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """hidden (B, T, C): logits (B, T, V); with targets (B, T) the summed loss, fp32."""
        if targets is None:
            return F.linear(hidden, self.weight)
        return self.kernels.loss(hidden.flatten(0, 1), self.weight, targets.flatten())


class Llama(nn.Module):
    """The language model: `Decoder` and an untied head. Its state dict is LlamaForCausalLM's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.kernels = PLAIN
        self.model = Decoder(config)
        self.lm_head = Head(config)

    def use(self, kernels: Kernels) -> None:
        """Compute with these from now on."""
        for module in self.modules():
            if hasattr(module, "kernels"):
                module.kernels = kernels

    def compile_blocks(self) -> None:
        """Compile each block's training pass; all blocks share one compiled function.

        What hooks do around a module stays outside the compiler, so ZeRO-3 must gather a block's weights as one
        (`deepspeed.utils.set_z3_leaf_modules`). Masks of other kinds than documents, caches and passes without gradients
        go uncompiled: their shapes change from call to call.
        """
        for layer in self.model.layers:
            layer.compiled = torch.compile(layer.compute, dynamic=False)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Fill every parameter, as Hugging Face names them, from its own seeded generator: the same on every rank.

        Normal(0, initializer_range); the projections that write into the residual stream are scaled by
        1/sqrt(2 * layers) (Radford et al., 2019), so that its variance does not grow with depth. Norms are 1.
        Raises RuntimeError where DeepSpeed has taken the weights away (`zero.Init`): filling what is left would do nothing.
        """
        residual = ("o_proj.weight", "down_proj.weight")
        for name, parameter in self.named_parameters():
            if parameter.numel() == 0:
                raise RuntimeError(f"{name} is partitioned: initialize inside deepspeed.zero.GatheredParameters")
        for index, (name, parameter) in enumerate(fused.hf_parameters(self)):
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            std = self.config.initializer_range
            if name.endswith(residual):
                std /= (2 * self.config.num_hidden_layers) ** 0.5
            generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits, or the summed loss where targets are given.

        ids: (B, T) int64. targets: (B, T) int64, already shifted, IGNORE_INDEX where there is no loss.
        positions: (B, T) or (1, T); default 0..T-1, after the cache's length. mask: boolean, broadcastable to
        (B, H, T, S), True where attention is allowed; default causal. documents: (B, T), the number of each token's
        document; attention then stays inside a document (not with a mask or a cache). last_only: logits of the last
        position alone.
        Returns (B, T, V) logits, or the scalar fp32 SUM of cross-entropy over the targets (divide by their count).
        """
        layout = None if documents is None else self.kernels.layout(documents)
        hidden = self.model(ids, positions, mask, cache, layout)  # (B, T, C)
        if targets is None:
            return self.lm_head(hidden[:, -1:] if last_only else hidden)
        return self.lm_head(hidden, targets)
