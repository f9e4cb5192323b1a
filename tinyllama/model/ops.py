"""The computations of a Llama that are worth a kernel of their own, in plain torch.

They run everywhere, a compiler can fuse them, and every other kernel (`kernels.py`) is held against them.
"""

# Shapes: B batch, T positions, H query heads, K key/value heads, G = H / K, D width of a head, C hidden size,
# F feed-forward size, V vocabulary, N positions of a whole batch.

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100  # a target that carries no loss; torch's own convention
QUERY_BLOCK = 128  # query positions that `blocked_attention` takes at a time


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, in fp32 whatever x's dtype (Zhang and Sennrich, 2019)."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embedding to x (B, heads, T, D) with cos and sin (B or 1, 1, T, D) in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding of queries (B, H, T, D) and keys (B, K, T, D)."""
    return rotate(q, cos, sin), rotate(k, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, 2020)."""
    return F.silu(gate) * up


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Grouped-query attention by torch: q (B, H, T, D), k and v (B, K, S, D) to (B, T, H * D); causal without a mask."""
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return y.transpose(1, 2).flatten(2)


class BlockedAttention(torch.autograd.Function):
    """Attention by blocks of queries, and its gradient from the probabilities alone, which are kept in q's dtype.

    q (B, K, G, T, D), k and v (B*K, T, D) to (B, K, G, T, D).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        groups, length, width = q.shape[2:]
        outputs, kept = [], []
        for start in range(0, length, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, length)
            rows = q[:, :, :, start:end].reshape(k.shape[0], groups * (end - start), width)
            scores = torch.bmm(rows, k[:, :end].transpose(1, 2)).unflatten(1, (groups, -1))  # (B*K, G, block, end)
            query = torch.arange(start, end, device=q.device)
            allowed = query[:, None] >= torch.arange(end, device=q.device)
            scores = (scores.float() / math.sqrt(width)).masked_fill(~allowed, -math.inf)
            weights = torch.softmax(scores, -1).to(v.dtype).flatten(1, 2)  # (B*K, G*block, end)
            kept.append(weights)
            outputs.append(torch.bmm(weights, v[:, :end]).view(*q.shape[:3], end - start, width))
        output = torch.cat(outputs, 3)
        ctx.save_for_backward(q, k, v, output, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        q, k, v, output, *kept = ctx.saved_tensors
        groups, length, width = q.shape[2:]
        # What the softmax takes off each row: the mean of its gradients, by Dao et al. (2022), equation 4.
        mean = (grad.float() * output.float()).sum(-1, keepdim=True)  # (B, K, G, T, 1)
        grad_q: list[Tensor] = []
        grad_k: Tensor | None = None
        grad_v: Tensor | None = None
        for index, weights in enumerate(kept):
            start = index * QUERY_BLOCK
            end = min(start + QUERY_BLOCK, length)
            block = (k.shape[0], groups * (end - start), -1)
            rows, grad_rows = (x[:, :, :, start:end].reshape(block) for x in (q, grad))
            grad_weights = torch.bmm(grad_rows, v[:, :end].transpose(1, 2))  # (B*K, G*block, end)
            offset = mean[:, :, :, start:end].reshape(block)
            grad_scores = weights.float() * (grad_weights.float() - offset) / math.sqrt(width)
            grad_scores = grad_scores.to(q.dtype)
            grad_q.append(torch.bmm(grad_scores, k[:, :end]).view(*q.shape[:3], end - start, width))
            # Summed over the blocks in fp32; a block has nothing to say of the keys after its end.
            of_k = F.pad(torch.bmm(grad_scores.transpose(1, 2), rows).float(), (0, 0, 0, length - end))
            of_v = F.pad(torch.bmm(weights.transpose(1, 2), grad_rows).float(), (0, 0, 0, length - end))
            grad_k = of_k if grad_k is None else grad_k + of_k
            grad_v = of_v if grad_v is None else grad_v + of_v
        assert grad_k is not None
        assert grad_v is not None
        return torch.cat(grad_q, 3), grad_k.to(k.dtype), grad_v.to(v.dtype)


def blocked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal grouped-query attention as matrix products and a softmax, for a compiler on a CPU.

    A block of queries meets only the keys up to its own end, which leaves out nearly half of the work; the heads of a
    group are rows of one product. q (B, H, T, D), k and v (B, K, T, D) to (B, T, H * D). Keeps the probabilities of
    half the (T, T) square for the backward pass, in q's dtype.
    """
    batch, heads, length, width = q.shape
    q = q.unflatten(1, (k.shape[1], -1))  # (B, K, G, T, D)
    output = BlockedAttention.apply(q, k.flatten(0, 1), v.flatten(0, 1))
    return output.permute(0, 3, 1, 2, 4).reshape(batch, length, heads * width)


def loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of logits (N, V) in fp32, and its gradient by the logits, in their dtype."""
    kept = targets != IGNORE_INDEX
    chosen = torch.where(kept, targets, 0).unsqueeze(1)  # (N, 1)
    logits32 = logits.float()
    most = logits32.amax(1, keepdim=True)
    exponents = (logits32 - most).exp()
    sums = exponents.sum(1, keepdim=True)
    losses = sums.log() + most - logits32.gather(1, chosen)
    loss = torch.where(kept, losses.squeeze(1), 0.0).sum()
    one = torch.arange(logits.shape[1], device=logits.device).unsqueeze(0) == chosen
    gradient = torch.where(kept.unsqueeze(1), exponents / sums - one.to(torch.float32), 0.0)
    return loss, gradient.to(logits.dtype)


class ChunkedLoss(torch.autograd.Function):
    """Cross-entropy over a linear head, with its gradients made on the way: no chunk of logits is ever made twice.

    Logits of one chunk of positions exist at a time. Their gradient is the softmax less one at the target, so it is
    multiplied into the gradients of hidden states and weight at once; the backward pass only scales these. The weight's
    is summed over the chunks in fp32.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk_tokens: int,
        of_logits: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, hidden.shape[0], chunk_tokens):
            piece = slice(start, start + chunk_tokens)
            loss, grad_logits = of_logits(hidden[piece] @ weight.t(), targets[piece])
            total += loss
            torch.mm(grad_logits, weight, out=grad_hidden[piece])
            grad_weight += grad_logits.t() @ hidden[piece]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        # In fp32: the factor is one over a number of tokens, which bf16 would round for all of the model below.
        return (grad_hidden.float() * grad).to(grad_hidden.dtype), (grad_weight * grad).to(ctx.dtype), None, None, None


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk_tokens: int = 1024,
    of_logits: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = loss_and_gradient,
) -> Tensor:
    """Cross-entropy summed over targets (N) that are not IGNORE_INDEX, of hidden (N, C) and the head (V, C); fp32."""
    if torch.is_grad_enabled():
        return ChunkedLoss.apply(hidden, weight, targets, chunk_tokens, of_logits)
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, hidden.shape[0], chunk_tokens):
        piece = slice(start, start + chunk_tokens)
        logits = F.linear(hidden[piece], weight).float()  # (chunk, V)
        total += F.cross_entropy(logits, targets[piece], ignore_index=IGNORE_INDEX, reduction="sum")
    return total
