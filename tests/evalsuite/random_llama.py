"""A very small random Llama with a long context and a tokenizer of its own: what it writes is nonsense, but quick."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import byte_bpe


def build(directory: Path, context: int = 2048, *, bos: bool = False, **changes: Any) -> Path:
    """Write it as transformers saves models: 1 layer, byte-level BPE trained on a module of CPython.

    bos: the tokenizer begins every text with <s>. changes: of the configuration.
    """
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    byte_bpe.save(directory, 512)
    if bos:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.save_pretrained(directory)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {
            "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2,
            "max_position_embeddings": context,
        }  # fmt: skip
        LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).save_pretrained(directory)
    return directory


def asked(kind: str, arguments: list[tuple[Any, ...]], task: str = "t") -> list[Any]:
    """lm-eval's requests of one task, an item each."""
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, 0, metadata=(task, number, 1)) for number, given in enumerate(arguments)]
