"""What decoding must move and compute: bytes and FLOPs per generated token, and the bound they set. Pure.

Each decoding step reads every weight once, and for each sequence the keys and values of its context.
"""

from __future__ import annotations

from tinyllama.model.config import ModelConfig

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def kv_bytes_per_token(model: ModelConfig, dtype: str) -> int:
    """Bytes of keys and values of one token in all layers. TinyLlama in bf16: 22,528."""
    return 2 * model.num_hidden_layers * model.kv_dim * BYTES[dtype]


def weight_bytes(model: ModelConfig, dtype: str) -> int:
    """Bytes of all weights. TinyLlama in bf16: 2.2e9."""
    return model.num_parameters * BYTES[dtype]


def decode_flops_per_token(model: ModelConfig, context: int) -> int:
    """FLOPs for one generated token at a context of that many tokens: two for every matmul weight, and attention."""
    return 2 * model.num_matmul_parameters + 4 * model.num_hidden_layers * model.hidden_size * context


def decode_bound(weights: float, kv_per_token: float, batch: int, context: int, bandwidth: float) -> float:
    """Upper bound on tokens/s: batch * bandwidth / (weights + batch * context * kv_per_token). bandwidth in bytes/s."""
    return batch * bandwidth / (weights + batch * context * kv_per_token)
