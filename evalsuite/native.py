"""Our own Llama behind lm-eval: from an export, any Hugging Face Llama directory, or a training checkpoint.

Tokens, bos policy and truncation are lm-eval's HFLM's, so that the scores are the hf backend's up to the order of
floating-point sums. What is computed is not: shared prefixes go through the model once (`scoring.py`, `generation.py`).
"""

from __future__ import annotations

import collections
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text
from transformers import LlamaConfig

from evalsuite import generation_settings, scorable
from evalsuite.backends import ModelChoice, exact_float32, tokenizer_directory
from evalsuite.budget import TOKENS_PER_ROW, Budget, budget_of, free_bytes
from evalsuite.cohorts import Prompt
from evalsuite.counting import CountingHFLM
from evalsuite.engines import Copies, Engine, Local
from evalsuite.generation import seed_of
from evalsuite.generation_settings import GenerationSettings, room_for_prompt
from evalsuite.scoring import Continuation, Work
from tinyllama import checkpoint, host_memory
from tinyllama.errors import UserError
from tinyllama.model import tokenizer_files
from tinyllama.model.config import ModelConfig
from tinyllama.model.hf import DTYPES, load_model
from tinyllama.model.llama import Llama

SAMPLING_SEED = 1234  # lm-eval's


def model_config(choice: ModelChoice) -> ModelConfig:
    """The architecture, from a checkpoint or a Hugging Face directory."""
    return choice.source.llama()


def load_tokenizer(choice: ModelChoice) -> Any:
    """The tokenizer, checked against the model: before the weights are read, which takes long."""
    directory = tokenizer_directory(choice)
    tokenizer = tokenizer_files.load(directory)
    if directory != Path(choice.path):
        shutil.rmtree(directory)
    num_tokens, vocab_size = 1 + max(tokenizer.get_vocab().values(), default=0), model_config(choice).vocab_size
    if num_tokens > vocab_size:
        raise UserError(
            f"the tokenizer of {choice.path} has {num_tokens} pieces, the model {vocab_size}",
            fix="use the tokenizer that the model was trained with",
        )
    return tokenizer


def hf_config(config: ModelConfig) -> LlamaConfig:
    """The configuration as transformers has it, which HFLM asks for."""
    return LlamaConfig(**{k: v for k, v in config.to_hf().items() if k not in ("architectures", "model_type")})


def _sharers(copies: int) -> int:
    """Of `copies` of a model on this machine, how many share the memory of one device."""
    return -(-copies // max(1, torch.cuda.device_count()))


class _Body(torch.nn.Module):
    """What HFLM asks of a model object that it is given: a config, a device, weights that can be tied."""

    def __init__(self, config: ModelConfig, llama: Llama | None = None) -> None:
        """llama: the model itself, unless it is in other processes."""
        super().__init__()
        self.llama = llama
        self.config = hf_config(config)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.llama is None else self.llama.lm_head.weight.device

    def tie_weights(self) -> None:
        """Nothing is tied in this architecture."""


class NativeLM(CountingHFLM):
    """lm-eval's interface over an `engines.Engine`; greedy or temperature sampling."""

    engine: Engine
    _ends: tuple[int, ...] = ()

    @property
    def work(self) -> Work:
        """What was computed so far."""
        return self.engine.work

    @classmethod
    def load(cls, choice: ModelChoice, copies: int = 1) -> NativeLM:
        """From a checkpoint (no conversion step) or a Hugging Face directory. copies: that share this machine's memory."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tokenizer = load_tokenizer(choice)
        if choice.dtype == "float32":
            exact_float32()
        if choice.source.is_checkpoint:
            llama, _ = checkpoint.load_model(choice.source.path, choice.dtype)
        else:
            llama = load_model(choice.path, choice.dtype)
        if device == "cpu":
            host_memory.keep()
        model = cls._around(_Body(llama.config, llama.to(device)), choice, tokenizer)
        budget = budget_of(llama, free_bytes(device) // _sharers(copies))
        if choice.batch_size is not None:
            budget = Budget(choice.batch_size * TOKENS_PER_ROW, choice.batch_size)
        model.engine = Local(llama, budget, model.eot_token_id, model.tokenizer.batch_decode)
        return model

    @classmethod
    def over_copies(cls, choice: ModelChoice) -> NativeLM:
        """choice.copies of the model, in processes of their own; here is none."""
        tokenizer = load_tokenizer(choice)
        copies = Copies(choice, choice.copies)
        try:
            model = cls._around(_Body(model_config(choice)), choice, tokenizer)
        except BaseException:
            copies.close()
            raise
        model.engine = copies
        return model

    @classmethod
    def _around(cls, body: _Body, choice: ModelChoice, tokenizer: Any) -> NativeLM:
        """All but the engine: the tokenizer and HFLM's settings."""
        model = cls(
            pretrained=body,
            tokenizer=tokenizer,
            batch_size=choice.batch_size or 1,
            max_length=choice.max_length,
            dtype=DTYPES[choice.dtype],
            backend="causal",
        )
        if not checkpoint.is_checkpoint(choice.path):
            model._ends = generation_settings.ends(Path(choice.path))
        return model

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(summed log-probability, is greedy) of ((context, continuation), context ids, continuation ids), in order."""
        scorable.refuse_unscorable(requests, self.max_length, self._instances)
        wanted = []
        for _, context, continuation in requests:
            ids = (context + continuation)[-(self.max_length + 1) :]  # HFLM's truncation: the beginning goes
            self.num_truncated += len(context) + len(continuation) > len(ids)
            wanted.append(Continuation(ids[:-1], continuation))
        found = self.engine.score(wanted)
        for (key, _, _), answer in zip(requests, found, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As HFLM's, but with the windows of all texts in one call."""
        batch_size = int(self.batch_size)
        self.batch_size_per_gpu = sys.maxsize
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)
        finally:
            self.batch_size_per_gpu = batch_size

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that continues each request's context, without the stop string that ended it."""
        self.refuse_endless()
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        prompts, repeats = [], collections.Counter[str]()
        for request in requests:
            context, given = request.args
            settings = GenerationSettings.of(given, self.max_gen_toks)
            settings.check("native")
            room = room_for_prompt(self.max_length, settings.most)
            ids = self.tok_encode(context)
            scorable.refuse_empty_prompt(request, ids)
            self.num_truncated += len(ids) > room
            seed = seed_of(ids, repeats[context], SAMPLING_SEED)
            repeats[context] += 1
            stops = tuple(handle_stop_sequences(list(settings.stops), eos=eos))
            prompts.append(Prompt(ids[-room:], settings.most, stops, settings.temperature, seed, self._ends))
        if not prompts:
            return []
        texts = [self.tok_decode(tokens) for tokens in self.engine.extend(prompts)]
        texts = [
            postprocess_generated_text(text, list(prompt.stops), think_end_token=None)
            for text, prompt in zip(texts, prompts, strict=True)
        ]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts
