"""lm-eval's hf backend, quiet; prompts that it cuts without a word are counted, texts are tokenized many at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from lm_eval.models.huggingface import HFLM

from tinyllama.errors import UserError

TOGETHER = 1024  # requests whose texts are tokenized by one call
Pair = tuple[str, str]


class CountingHFLM(HFLM):
    """HFLM that counts in `num_truncated` the prompts whose beginning was cut off to fit the context.

    lm-eval tokenizes the same prompt once for each of its answers, one text after the other. Here each text of the next
    TOGETHER requests is tokenized once, on all cores; which texts, and what becomes of them, HFLM's own code says.
    """

    num_truncated = 0
    _coming: Iterator[Pair] = iter(())  # the requests of this call that were not yet tokenized
    _pairs: Mapping[Pair, tuple[list[int], list[int]]] = MappingProxyType({})  # those that were
    _asked: dict[str, None] | None = None  # while they are being learned: the texts that HFLM asks for
    _encoded: Mapping[str, list[int]] = MappingProxyType({})  # while they are in use

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        self._coming = iter([request.args for request in requests])
        try:
            return super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._coming, self._pairs = iter(()), {}

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
        for _, context, continuation in requests:
            # The last token of the continuation is scored but never read.
            self.num_truncated += len(context) + len(continuation) - 1 > self.max_length
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        for request in requests:
            context, settings = request.args
            room = self.room_for_prompt(int(settings.get("max_gen_toks", self.max_gen_toks)))
            self.num_truncated += len(self.tok_encode(context)) > room
        return super().generate_until(requests, disable_tqdm=True)

    def room_for_prompt(self, generated: int) -> int:
        """Tokens that a prompt may have where `generated` follow it; UserError where there are none."""
        room = self.max_length - generated
        if room <= 0:
            raise UserError(
                f"this task generates up to {generated} tokens, the model's context is {self.max_length}",
                fix="leave it out, or use a model with a longer context",
            )
        return room
