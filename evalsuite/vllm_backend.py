"""lm-eval's vLLM backend, with the same requests refused as by the others (`scorable.py`), and what it cuts counted.

It slices a request that does not fit by a negative number of context tokens, and sums no log-probabilities to 0.0.
"""

from __future__ import annotations

from typing import Any

from lm_eval.models.vllm_causallms import VLLM

from evalsuite import scorable
from evalsuite.generation_settings import GenerationSettings, room_for_prompt


class CheckedVLLM(VLLM):
    """VLLM that refuses requests without an answer, and counts in `num_truncated` the prompts that it cut."""

    num_truncated = 0
    _instances: list[Any] = []  # noqa: RUF012 - replaced for each call, never changed

    @property
    def _room(self) -> int:
        """Tokens of a context and its continuation together: it keeps one for a token that nobody asked for."""
        return int(self.max_length) - 1

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        scorable.refuse_tokenless(requests, lambda text: self.tok_encode(text, add_special_tokens=False))
        self._instances = requests
        try:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        finally:
            self._instances = []

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        scorable.refuse_unscorable(requests, self._room - 1, self._instances)
        self.num_truncated += sum(len(context) + len(targets) > self._room for _, context, targets in requests)
        found = super()._loglikelihood_tokens(requests, *args, **kwargs)
        scorable.refuse_not_numbers(found)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        for request in requests:
            context, given = request.args
            room = room_for_prompt(int(self.max_length), GenerationSettings.of(given, self.max_gen_toks).most)
            ids = self.tok_encode(context)
            scorable.refuse_empty_prompt(request, ids)
            self.num_truncated += len(ids) > room
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    @staticmethod
    def modify_gen_kwargs(gen_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As VLLM's, without the settings that change nothing, many of which vLLM does not know."""
        settings = GenerationSettings.of(gen_kwargs)
        idle = settings.others.keys() - settings.meant.keys()
        kept = {name: value for name, value in gen_kwargs.items() if name not in idle}
        if "temperature" in kept:
            kept["temperature"] = float(kept["temperature"])  # YAML reads 1e-1 as text
        return VLLM.modify_gen_kwargs(kept, *args, **kwargs)
