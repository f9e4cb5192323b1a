"""lm-eval's hf backend, quiet; prompts that it cuts without a word are counted, texts are tokenized many at once.

Each request gets what it would get alone, and one that has no answer is refused by name (`scorable.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from evalsuite import scorable
from evalsuite.generation_settings import GenerationSettings, room_for_prompt
from evalsuite.generation_trial import as_transformers_takes
from evalsuite.greedy import not_numbers
from tinyllama.errors import UserError

TOGETHER = 1024  # requests whose texts are tokenized by one call
Pair = tuple[str, str]


class CountingHFLM(HFLM):
    """HFLM that counts in `num_truncated` the prompts whose beginning was cut off to fit the context.

    lm-eval tokenizes the same prompt once for each of its answers, one text after the other. Here each text of the next
    TOGETHER requests is tokenized once, on all cores; which texts, and what becomes of them, HFLM's own code says.
    """

    num_truncated = 0
    _instances: Sequence[Any] = ()  # of this call of loglikelihood
    _coming: Iterator[Pair] = iter(())  # the requests of this call that were not yet tokenized
    _pairs: Mapping[Pair, tuple[list[int], list[int]]] = MappingProxyType({})  # those that were
    _asked: dict[str, None] | None = None  # while they are being learned: the texts that HFLM asks for
    _encoded: Mapping[str, list[int]] = MappingProxyType({})  # while they are in use

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.prefix_token_id is None:
            raise UserError(
                "the model's tokenizer has neither a bos nor an eos token", fix="name one in tokenizer_config.json"
            )
        self._vocabulary = int(self.config.get_text_config().vocab_size)
        self._has_beyond = max(self.tokenizer.get_vocab().values(), default=0) >= self._vocabulary

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        scorable.refuse_tokenless(requests, lambda text: self.tok_encode(text, add_special_tokens=False))
        self._coming, self._instances = iter([request.args for request in requests]), requests
        try:
            return super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._coming, self._pairs, self._instances = iter(()), {}, ()

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        pair = (context, continuation)
        while pair not in self._pairs and (following := list(itertools.islice(self._coming, TOGETHER))):
            self._pairs = self._encode_pairs([other for other in following if other[0]])
        return self._pairs[pair] if pair in self._pairs else super()._encode_pair(*pair)

    def _encode_pairs(self, pairs: list[Pair]) -> dict[Pair, tuple[list[int], list[int]]]:
        """HFLM's context and continuation ids of each pair: asked once to learn its texts, once more when they are known."""
        asked: dict[str, None] = {}
        self._asked = asked
        try:
            for pair in pairs:
                super()._encode_pair(*pair)
        finally:
            self._asked = None
        settings = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        texts = list(asked)
        ids = self.tokenizer(texts, return_attention_mask=False, **settings)["input_ids"] if texts else []
        self._encoded = dict(zip(texts, ids, strict=True))
        try:
            return {pair: super(CountingHFLM, self)._encode_pair(*pair) for pair in pairs}
        finally:
            self._encoded = {}

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        plain = add_special_tokens is None and not left_truncate_len and not kwargs
        if plain and string in self._encoded:
            return list(self._encoded[string])
        if self._asked is None:
            return super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
        # A text that brings its own bos token is left to HFLM.
        if plain and not string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            self._asked[string] = None
        return []

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        scorable.refuse_unscorable(requests, self.max_length, self._instances)
        found = self._answers(requests, *args, **kwargs)
        scorable.refuse_not_numbers(found)
        return found

    def _answers(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        """HFLM's, of requests that were checked, each as if it were alone."""
        if self._has_beyond:
            named = self._instances if len(self._instances) == len(requests) else [None] * len(requests)
            for (_, context, continuation), instance in zip(requests, named, strict=True):
                scorable.refuse_beyond([*context, *continuation], self._vocabulary, instance)
        for _, context, continuation in requests:
            # The last token of the continuation is scored but never read.
            self.num_truncated += len(context) + len(continuation) - 1 > self.max_length
        found: list[Any] = [None] * len(requests)
        for part in _rounds(requests):
            answers = super()._loglikelihood_tokens([requests[index] for index in part], *args, **kwargs)
            for index, answer in zip(part, answers, strict=True):
                found[index] = answer
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self.refuse_endless()
        for request in requests:
            context, given = request.args
            room = room_for_prompt(self.max_length, GenerationSettings.of(given, self.max_gen_toks).most)
            ids = self.tok_encode(context)
            scorable.refuse_empty_prompt(request, ids)
            if self._has_beyond:
                scorable.refuse_beyond(ids, self._vocabulary, request)
            self.num_truncated += len(ids) > room
        return super().generate_until(requests, disable_tqdm=True)

    def refuse_endless(self) -> None:
        """UserError where the tokenizer has no token that ends a text."""
        if self.eot_token_id is None:
            raise UserError("the model's tokenizer has no eos token", fix="name one in tokenizer_config.json")

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As HFLM's, but that each text, not the first for all, says whether it brings its own bos token."""
        if len({has_bos_prefix(text, self.tokenizer.bos_token) for text in strings}) < 2:
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
        ids = {"input_ids": [self.tok_encode(text, None, left_truncate_len) for text in strings]}
        padded = self.tokenizer.pad(ids, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        settings.pop("use_cache", None)  # which HFLM gives by itself
        settings = as_transformers_takes(settings)
        settings["logits_processor"] = LogitsProcessorList([_Numbers()])
        return super()._model_generate(context, max_length, stop, **settings)


class _Numbers(LogitsProcessor):
    """Refuses logits (R, V) from which no token can be chosen; transformers would take the first NaN for the largest."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not torch.isfinite(scores.amax(-1)).all():
            raise not_numbers()
        return scores


def _rounds(requests: Sequence[Any]) -> list[list[int]]:
    """The requests' indices, in as many calls of HFLM as it needs to score each as it would alone; nearly always one.

    HFLM runs requests that read the same tokens once, and takes the first positions of the longest continuation for those
    of a shorter one, though its last are meant: such requests are kept apart.
    """
    rounds: list[list[int]] = []
    lengths: dict[tuple[int, ...], list[int]] = {}  # of the continuations behind the same tokens
    for index, (_, context, continuation) in enumerate(requests):
        known = lengths.setdefault((*context, *continuation[:-1]), [])
        if len(continuation) not in known:
            known.append(len(continuation))
            if len(known) > len(rounds):
                rounds.append([])
        rounds[known.index(len(continuation))].append(index)
    return rounds
