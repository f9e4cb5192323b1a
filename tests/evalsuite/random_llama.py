"""A very small random Llama with a long context and a tokenizer of its own: what it writes is nonsense, but quick."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import byte_bpe

if TYPE_CHECKING:
    from tinyllama.model.llama import Llama


def build(directory: Path, context: int = 2048) -> Path:
    """Write it as transformers saves models: 1 layer, byte-level BPE trained on a module of CPython."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    byte_bpe.save(directory, 512)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, bos_token_id=1, eos_token_id=2, max_position_embeddings=context,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def decided(vocabulary: int) -> Llama:
    """Ours, with weights so large that its choices are far from uniform: a wrong prefix shows."""
    import torch

    from tinyllama.model.config import ModelConfig
    from tinyllama.model.llama import Llama

    llama = Llama(
        ModelConfig(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512,
        )
    )  # fmt: skip
    llama.initialize(3)
    with torch.no_grad():
        for parameter in llama.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return llama
