"""How much goes through a model at once, by its size, its device and the memory that is free; less where memory ends."""

from __future__ import annotations

import dataclasses
import traceback

import torch

from evalsuite.batched_attention import BLOCKS, QUERIES
from tinyllama import host_memory
from tinyllama.errors import UserError
from tinyllama.model.config import ModelConfig
from tinyllama.model.llama import Llama

# Largest number of tokens of a pass and rows of a generation step. On two CPU cores 4,096 tokens are as fast as more; a
# GPU's large matrix products are at their full rate well below 32,768.
PASS_TOKENS, ROWS = {"cpu": 4096, "cuda": 32768}, {"cpu": 256, "cuda": 1024}
PASS_SHARE, ROWS_SHARE = 0.5, 0.25  # of the free memory: a pass (on a GPU), the keys and values of all rows
ROW_TOKENS = 1024  # that a row keeps keys and values of, for the number of rows
MASK_KEYS = 2048  # per query, for the memory that a pass's masks take
TOKENS_PER_ROW = 256  # of a pass, for a batch size given in rows
SMALLEST_PASS = 64
LOGIT_ROWS, LOGIT_BYTES = 512, 2**30  # positions whose logits exist at a time: on a CPU; what they may take on a GPU


@dataclasses.dataclass
class Budget:
    """How much goes through the model at once: tokens of a pass, rows of a generation step. Halved where memory ends.

    batched: attention in few large calls, or in many small ones; None: what suits the model's device.
    """

    tokens: int
    rows: int
    batched: bool | None = None

    def halve(self, error: Exception) -> None:
        """After an out-of-memory error: half of it, or the error again where little is left."""
        if self.tokens <= SMALLEST_PASS:
            raise UserError(
                f"not enough memory for a pass of {self.tokens} tokens", fix="use a smaller dtype or a larger machine"
            ) from error
        self.tokens, self.rows = self.tokens // 2, max(1, self.rows // 2)
        # What the failed pass had computed hangs on the frames of the error.
        traceback.clear_frames(error.__traceback__)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        host_memory.trim()

    def batches(self, device_type: str) -> bool:
        """Whether attention runs in few large calls on such a device."""
        return prefers_batches(device_type) if self.batched is None else self.batched


def prefers_batches(device_type: str) -> bool:
    """A GPU waits for the launch of every call; a CPU pays for the padding that few calls need."""
    return device_type != "cpu"


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory ended, on a GPU or in the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def free_bytes(device_type: str) -> int:
    """Memory that is free, of the GPU or of this machine."""
    if device_type == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)


def token_bytes(config: ModelConfig, element_size: int) -> int:
    """Estimate of what a token of a pass takes on a GPU: one layer's activations, masks, all layers' keys and values."""
    activations = (8 * config.hidden_size + 3 * config.intermediate_size) * element_size + 8 * config.hidden_size
    masks = MASK_KEYS * (config.num_attention_heads // config.num_key_value_heads) * element_size
    return activations + masks + _cached_bytes(config, element_size)


def _cached_bytes(config: ModelConfig, element_size: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * config.num_hidden_layers * config.kv_dim * element_size


def pass_tokens(config: ModelConfig, element_size: int, device_type: str, free: int) -> int:
    """Tokens of a pass: on a GPU whole calls of attention, as many as fit in a share of the free memory."""
    if device_type == "cpu":
        return PASS_TOKENS["cpu"]
    fitting = int(free * PASS_SHARE) // token_bytes(config, element_size)
    unit = BLOCKS * QUERIES if fitting >= BLOCKS * QUERIES else QUERIES
    return max(QUERIES, min(PASS_TOKENS[device_type], fitting // unit * unit))


def budget_of(llama: Llama, free: int) -> Budget:
    """What goes through the model at once, by the bytes of memory that are free beside its weights."""
    weight = llama.lm_head.weight
    device, size = weight.device.type, weight.element_size()
    rows = int(free * ROWS_SHARE) // (_cached_bytes(llama.config, size) * ROW_TOKENS)
    return Budget(pass_tokens(llama.config, size, device, free), max(1, min(ROWS[device], rows)))


def logit_rows(device_type: str, vocab_size: int) -> int:
    """Positions whose logits exist at a time: in the model's dtype, in fp32, and once more inside of the softmax."""
    if device_type == "cpu":
        return LOGIT_ROWS
    return max(1, LOGIT_BYTES // (12 * vocab_size))
