"""lm-eval's hf backend, which cuts prompts that do not fit without a word; here they are counted, and it is quiet."""

from __future__ import annotations

from typing import Any

from lm_eval.models.huggingface import HFLM

from tinyllama.errors import UserError


class CountingHFLM(HFLM):
    """HFLM that counts in `num_truncated` the prompts whose beginning was cut off to fit the context."""

    num_truncated = 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return super().loglikelihood(requests, disable_tqdm=True)

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
