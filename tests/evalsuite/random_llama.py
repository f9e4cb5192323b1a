"""A very small random Llama with a long context and a tokenizer of its own: what it writes is nonsense, but quick."""

from __future__ import annotations

from pathlib import Path

import byte_bpe


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
