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


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, 2020) of both side by side, (..., 2 * F) to (..., F)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Grouped-query attention by torch: q (B, H, T, D), k and v (B, K, S, D) to (B, T, H * D); causal without a mask."""
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return y.transpose(1, 2).flatten(2)


def document_mask(documents: Tensor) -> Tensor:
    """The attention mask of packed documents: (B, T) document numbers to (B, 1, T, T), causal inside each document."""
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return ((documents[:, :, None] == documents[:, None, :]) & causal).unsqueeze(1)


def _blocks(length: int) -> list[tuple[int, int]]:
    """Start and end of each block of queries."""
    return [(start, min(start + QUERY_BLOCK, length)) for start in range(0, length, QUERY_BLOCK)]


def _rows(x: Tensor, start: int, end: int) -> Tensor:
    """Positions start to end of x (B, K, G, T, W) as the rows of a product for each key head: (B*K, G*block, W)."""
    return x[:, :, :, start:end].flatten(2, 3).flatten(0, 1)


def _probabilities(q: Tensor, k: Tensor, start: int, end: int, documents: Tensor | None = None) -> Tensor:
    """Of queries start to end, on the keys up to their end, in the inputs' dtype: (B*K, G*block, end).

    documents (B*K, T): a query meets the keys of its own document alone.
    """
    scores = torch.bmm(_rows(q, start, end), k[:, :end].transpose(1, 2)).unflatten(1, (q.shape[2], -1))
    allowed = torch.arange(start, end, device=q.device)[:, None] >= torch.arange(end, device=q.device)
    if documents is not None:
        allowed = allowed & (documents[:, start:end, None] == documents[:, None, :end])  # (B*K, block, end)
        allowed = allowed.unsqueeze(1)
    scores = (scores.float() / math.sqrt(q.shape[-1])).masked_fill(~allowed, -math.inf)  # (B*K, G, block, end)
    return torch.softmax(scores, -1).to(q.dtype).flatten(1, 2)


def _joined(blocks: list[Tensor], like: Tensor) -> Tensor:
    """The rows of all blocks as `like`: (B, K, G, T, W)."""
    return torch.cat([block.view(*like.shape[:3], -1, like.shape[-1]) for block in blocks], 3)


class BlockedAttention(torch.autograd.Function):
    """Attention by blocks of queries; its gradient from the probabilities, kept in the inputs' dtype, not from scores.

    q (B, K, G, T, D), k and v (B*K, T, D), documents (B*K, T) or None, to (B, K, G, T, D). Has a first derivative alone.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:  # type: ignore[override]
        kept = [_probabilities(q, k, start, end, documents) for start, end in _blocks(q.shape[3])]
        output = _joined([torch.bmm(weights, v[:, : weights.shape[2]]) for weights in kept], q)
        ctx.save_for_backward(q, k, v, output, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        q, k, v, output, *kept = ctx.saved_tensors
        # What the softmax takes off each row: the mean of its gradients (Dao et al., 2022, section B.2).
        mean = (grad.float() * output.float()).sum(-1, keepdim=True)  # (B, K, G, T, 1)
        grad_q = []
        grad_k, grad_v = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for (start, end), weights in zip(_blocks(q.shape[3]), kept, strict=True):
            rows, grad_rows = _rows(q, start, end), _rows(grad, start, end)
            grad_weights = torch.bmm(grad_rows, v[:, :end].transpose(1, 2))  # (B*K, G*block, end)
            grad_scores = weights.float() * (grad_weights.float() - _rows(mean, start, end)) / math.sqrt(q.shape[-1])
            grad_scores = grad_scores.to(q.dtype)
            grad_q.append(torch.bmm(grad_scores, k[:, :end]))
            # Summed over the blocks in fp32; a block has nothing to say of the keys after its end.
            after = (0, 0, 0, k.shape[1] - end)
            grad_k = grad_k + F.pad(torch.bmm(grad_scores.transpose(1, 2), rows).float(), after)
            grad_v = grad_v + F.pad(torch.bmm(weights.transpose(1, 2), grad_rows).float(), after)
        return _joined(grad_q, q), grad_k.to(k.dtype), grad_v.to(v.dtype), None


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
    """Causal grouped-query attention as matrix products and a softmax, for a compiler on a CPU.

    A block of queries meets only the keys up to its own end, which leaves out nearly half of the work; the heads of a
    group are rows of one product. q (B, H, T, D), k and v (B, K, T, D) to (B, T, H * D). For the backward pass it keeps
    the probabilities of half the (T, T) square in the inputs' dtype. documents (B, T): numbers; attention stays inside.
    """
    batch, heads, length, width = q.shape
    if documents is not None:
        documents = documents.repeat_interleave(k.shape[1], 0)  # (B*K, T)
    q = q.unflatten(1, (k.shape[1], -1))  # (B, K, G, T, D)
    k, v = k.flatten(0, 1), v.flatten(0, 1)  # (B*K, T, D)
    if torch.is_grad_enabled():
        output = BlockedAttention.apply(q, k, v, documents)
    else:
        blocks = _blocks(length)
        output = _joined([torch.bmm(_probabilities(q, k, *block, documents), v[:, : block[1]]) for block in blocks], q)
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


def accumulate_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (M, N), fp32, plus a (M, L) @ b (L, N), in place.

    On a GPU the product itself adds into the total: no product in low precision is written, read and rounded first (torch
    since 2.10, which takes an fp32 total of low-precision factors).
    (Not inside a whole compiled model, where the compiler has no such product.)
    """
    if total.device.type == "cuda" and not torch.compiler.is_compiling():
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


LOSS_BYTES = 2**30  # for a chunk's logits and their gradient in 16 bits, on a GPU


def loss_chunk_tokens(vocabulary: int, device: str) -> int:
    """Positions whose logits exist at a time: 1024 on a CPU, else a power of two from 1024 to 16384 that fits.

    Each chunk reads and writes the head's gradient in fp32 once, 8 V C bytes for 6 V C FLOPs a position: at 3 TB/s and
    700 TFLOP/s that adds 30% to the products' time at 1024 positions, 8% at 4096, whatever V and C are.
    """
    if device != "cuda":
        return 1024
    most = LOSS_BYTES // (4 * vocabulary)
    return min(16384, max(1024, 1 << (most.bit_length() - 1)))


class ChunkedLoss(torch.autograd.Function):
    """Cross-entropy over a linear head, with its gradients made on the way: no chunk of logits is ever made twice.

    Logits of one chunk of positions exist at a time. Their gradient is the softmax less one at the target, so it is
    multiplied into the gradients of hidden states and weight at once; the backward pass only scales these. The weight's
    is summed over the chunks in fp32. Has a first derivative alone.
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
            accumulate_(grad_weight, grad_logits.t(), hidden[piece])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        # In fp32: the factor is one over a number of tokens, which bf16 would round for all of the model below. Of one
        # dimension it is not taken for a scalar of the other's dtype; with `out` no fp32 copy is written on the way.
        factor = grad.float().reshape(1)
        scaled_hidden = torch.mul(grad_hidden, factor, out=torch.empty_like(grad_hidden))
        scaled_weight = torch.mul(grad_weight, factor, out=torch.empty_like(grad_weight, dtype=ctx.dtype))
        return scaled_hidden, scaled_weight, None, None, None


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk_tokens: int | None = None,
    of_logits: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = loss_and_gradient,
) -> Tensor:
    """Cross-entropy summed over targets (N) that are not IGNORE_INDEX, of hidden (N, C) and the head (V, C); fp32.

    chunk_tokens: positions at a time; by default `loss_chunk_tokens`.
    """
    chunk_tokens = chunk_tokens or loss_chunk_tokens(weight.shape[0], hidden.device.type)
    if torch.is_grad_enabled():
        return ChunkedLoss.apply(hidden, weight, targets, chunk_tokens, of_logits)
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, hidden.shape[0], chunk_tokens):
        piece = slice(start, start + chunk_tokens)
        logits = F.linear(hidden[piece], weight).float()  # (chunk, V)
        total += F.cross_entropy(logits, targets[piece], ignore_index=IGNORE_INDEX, reduction="sum")
    return total
