"""A small random Llama with a tokenizer of its own, in a directory as transformers saves them."""

from __future__ import annotations

from pathlib import Path

import byte_bpe

VOCAB_SIZE, CONTEXT = 384, 256
# head_dim 64: vLLM's attention on CPU does not take every size.
SHAPE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


def build(directory: Path, dtype: str = "bfloat16") -> Path:
    """Write it: random weights, byte-level BPE trained here."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    byte_bpe.save(directory, VOCAB_SIZE)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": CONTEXT}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, **SHAPE, **HEADS, **ids))
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    return directory
