"""Our own Llama behind lm-eval: from an export, any Hugging Face Llama directory, or a training checkpoint.

Everything but the two model calls is lm-eval's HFLM (tokens, bos policy, truncation, grouping, post-processing), so that
the scores are the hf backend's up to the order of floating-point sums.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.utils_hf import stop_sequences_criteria
from transformers import AutoTokenizer, LlamaConfig

from evalsuite.backends import ModelChoice, tokenizer_directory
from evalsuite.counting import CountingHFLM
from tinyllama import checkpoint
from tinyllama.errors import UserError
from tinyllama.model.config import ModelConfig
from tinyllama.model.hf import DTYPES, load_model
from tinyllama.model.llama import KVCache, Llama


def hf_config(config: ModelConfig) -> LlamaConfig:
    """The configuration as transformers has it, which HFLM asks for."""
    return LlamaConfig(**{k: v for k, v in config.to_hf().items() if k not in ("architectures", "model_type")})


class _Body(torch.nn.Module):
    """What HFLM asks of a model object that it is given: a config, a device, weights that can be tied."""

    def __init__(self, llama: Llama) -> None:
        super().__init__()
        self.llama = llama
        self.config = hf_config(llama.config)

    @property
    def device(self) -> torch.device:
        return self.llama.lm_head.weight.device

    def tie_weights(self) -> None:
        """Nothing is tied in this architecture."""


class NativeLM(CountingHFLM):
    """lm-eval's interface over `Llama`; greedy or temperature sampling with a key-value cache."""

    @classmethod
    def load(cls, choice: ModelChoice) -> NativeLM:
        """From a checkpoint (no conversion step) or a Hugging Face directory."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        directory = tokenizer_directory(choice)
        if checkpoint.is_checkpoint(choice.path):
            llama, _ = checkpoint.load_model(choice.path, choice.dtype)
        else:
            llama = load_model(choice.path, choice.dtype)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        if directory != Path(choice.path):
            shutil.rmtree(directory)
        if len(tokenizer) > llama.config.vocab_size:
            raise UserError(
                f"the tokenizer of {choice.path} has {len(tokenizer)} pieces, the model {llama.config.vocab_size}",
                fix="use the tokenizer that the model was trained with",
            )
        body = _Body(llama.to(device))
        return cls(
            pretrained=body,
            tokenizer=tokenizer,
            batch_size=choice.batch_size,
            max_length=choice.max_length,
            dtype=DTYPES[choice.dtype],
            backend="causal",
        )

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        """Logits (B, T, V) of right-padded rows (B, T); causal, so the padding changes nothing before it."""
        with torch.no_grad():
            return self.model.llama(inps)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        """Continue left-padded rows (B, T) until every one has ended or `max_length` is reached: (B, up to max_length)."""
        allowed = kwargs.pop("attention_mask").bool()  # (B, T)
        temperature = kwargs.pop("temperature", 0.0) or 0.0
        sampling = bool(kwargs.pop("do_sample", temperature > 0)) and temperature > 0
        for name, value in kwargs.items():
            raise UserError(f"generation setting {name}={value!r}", fix="use --backend hf or vllm for this task")
        rows, length = context.shape
        llama: Llama = self.model.llama
        cache = KVCache(llama.config, rows, max_length, llama.lm_head.weight.dtype, context.device)
        ended = stop_sequences_criteria(self.tokenizer, stop, length, rows)
        positions = (allowed.cumsum(1) - 1).clamp(min=0)
        causal = torch.ones(length, length, dtype=torch.bool, device=context.device).tril()
        # Padding rows may attend to themselves: a softmax over nothing would be NaN.
        mask = (causal & allowed[:, None, :]) | torch.eye(length, dtype=torch.bool, device=context.device)
        sequence, done = context, torch.zeros(rows, dtype=torch.bool, device=context.device)
        eos, pad = self.eot_token_id, self.tokenizer.pad_token_id
        with torch.no_grad():
            logits = llama(context, positions=positions, mask=mask[:, None], cache=cache, last_only=True)[:, -1]
            while True:
                if sampling:
                    chosen = torch.multinomial((logits.float() / temperature).softmax(-1), 1)[:, 0]
                else:
                    chosen = logits.argmax(-1)
                chosen = torch.where(done, pad, chosen)
                sequence = torch.cat((sequence, chosen[:, None]), 1)
                done = done | (chosen == eos) | torch.as_tensor(ended(sequence, None), device=context.device)
                if sequence.shape[1] >= max_length or bool(done.all()):
                    return sequence
                allowed = torch.cat((allowed, torch.ones(rows, 1, dtype=torch.bool, device=context.device)), 1)
                positions = positions[:, -1:] + 1
                step = allowed[:, None, None, :]  # (B, 1, 1, S)
                logits = llama(chosen[:, None], positions=positions, mask=step, cache=cache)[:, -1]
