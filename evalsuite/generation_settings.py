"""How a task wants text to be generated: its `generation_kwargs`, checked before a model is loaded, and what they mean.

lm-eval hands them to each backend as they are. What says nothing (a beam of one) or cannot matter (top_p where nothing is
drawn) is ignored, as transformers ignores it; what the native backend cannot do is refused, and so is what no backend can.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evalsuite import generation_trial
from tinyllama.data.durable import read_json
from tinyllama.errors import UserError, nearest

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts
DEFAULT_MOST = 256  # tokens; lm-eval's
# Names that transformers knows and the value of each that changes nothing.
NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "penalty_alpha": 0,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "guidance_scale": 1,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "top_p": 1,
    "top_k": 0,
    "min_p": 0,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "top_h": None,
}
# Of those that change something, lowest and highest. Above 0 is from TINY on; whole numbers are those of WHOLE.
TINY = 1e-9
RANGES: dict[str, tuple[float, float]] = {
    "top_p": (0, 1),
    "min_p": (0, 1),
    "top_h": (TINY, 1),
    "typical_p": (TINY, 1),
    "epsilon_cutoff": (0, 1),
    "eta_cutoff": (0, 1),
    "top_k": (1, math.inf),
    "num_beams": (1, math.inf),
    "num_return_sequences": (1, 1),
    "repetition_penalty": (TINY, math.inf),
    "no_repeat_ngram_size": (0, math.inf),
    "min_length": (0, math.inf),
    "min_new_tokens": (0, math.inf),
    "max_time": (0, math.inf),
}
OF_VLLM: dict[str, tuple[float, float]] = {  # where they are others, or vLLM's alone
    "temperature": (0, 2),
    "top_p": (TINY, 1),
    "top_k": (-1, math.inf),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "min_tokens": (0, math.inf),
}
WHOLE = (
    "top_k", "num_beams", "num_return_sequences", "no_repeat_ngram_size", "min_length", "min_new_tokens", "min_tokens",
)  # fmt: skip
# Without meaning where nothing is drawn; for one beam; for any text.
OF_DRAWING = ("top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "seed")
OF_BEAMS = ("early_stopping", "length_penalty")
WITHOUT_EFFECT = ("use_cache",)
OF_LM_EVAL = ("pad_token_id", "return_dict_in_generate")  # which it gives to transformers itself, or needs as it is
# Of vLLM's SamplingParams, which take 20 seconds to import, those that leave one text per prompt.
KNOWN_TO_VLLM = (
    "presence_penalty", "frequency_penalty", "repetition_penalty", "top_p", "top_k", "min_p", "seed", "stop_token_ids",
    "ignore_eos", "min_tokens", "bad_words", "allowed_token_ids", "logit_bias", "skip_special_tokens",
    "spaces_between_special_tokens", "include_stop_str_in_output", "structured_outputs",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """At most `most` tokens, up to one of the `stops`; temperature 0 takes the most likely token, others are drawn.

    others: what is given beside these, by name.
    """

    most: int
    stops: tuple[str, ...]
    temperature: float
    others: Mapping[str, Any]

    @classmethod
    def of(cls, given: Any, default_most: int = DEFAULT_MOST) -> GenerationSettings:
        """Of a task's generation_kwargs (None: lm-eval's default); UserError for a value that has no meaning."""
        if not isinstance(given, Mapping):
            if given is not None:
                raise UserError(f"generation_kwargs {given!r} is not a mapping", fix="give settings by name")
            given = {}
        lengths = {name: _length(name, given[name]) for name in LENGTHS if given.get(name) is not None}
        temperature = _temperature(given.get("temperature", 0.0))
        drawn = given.get("do_sample")
        if drawn is None:
            drawn = temperature > 0
        if not isinstance(drawn, bool):
            raise UserError(f"generation setting do_sample={drawn!r}", fix="give true or false")
        if drawn and temperature == 0:
            raise UserError(
                "generation setting do_sample=True without a temperature above 0",
                fix="give a temperature, or do_sample: false",
            )
        others = {
            name: value for name, value in given.items() if name not in (*LENGTHS, "until", "temperature", "do_sample")
        }
        most = next(iter(lengths.values()), default_most)
        return cls(most, _stops(given.get("until", [])), temperature if drawn else 0.0, others)

    @property
    def meant(self) -> dict[str, Any]:
        """Those of the others that can change a text."""
        beams = self.others.get("num_beams") in (None, 1)
        return {
            name: value
            for name, value in self.others.items()
            if value is not None
            and name not in WITHOUT_EFFECT
            and not (name in NEUTRAL and value == NEUTRAL[name])
            and not (name in OF_DRAWING and self.temperature == 0)
            and not (name in OF_BEAMS and beams)
        }

    def check(self, backend: str) -> None:
        """UserError where this backend would fail, or write another text than was asked for."""
        meant = self.meant
        if backend == "vllm":
            _check_range("temperature", self.temperature, backend)
            if isinstance(least := meant.get("min_tokens"), int) and least > self.most:
                raise UserError(
                    f"generation setting min_tokens={least}, at most {self.most} are generated", fix="give less"
                )
        for name, value in meant.items():
            if backend == "native":
                raise UserError(
                    f"generation setting {name}={value!r} is not one of the native backend",
                    fix="use --backend hf or vllm for this task",
                )
            _check_range(name, value, backend)
        known = _known(backend)
        for name in self.others:
            if known and name not in known and (name in meant or backend == "hf"):
                raise UserError(
                    f"generation setting {name} is unknown to --backend {backend}", fix=nearest(name, known)
                )
        if backend == "hf":
            self._try()

    def _try(self) -> None:
        """UserError for what transformers refuses only while it generates."""
        if "max_length" in self.others:  # which lm-eval would take in the place of max_gen_toks
            raise UserError(
                f"generation setting max_length={self.others['max_length']!r} counts the prompt",
                fix="give max_gen_toks",
            )
        given = {name: value for name, value in self.others.items() if name not in WITHOUT_EFFECT}
        if given:
            drawn = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
            generation_trial.refuse({**given, **drawn})


def check_tasks(generation: Mapping[str, Any], backend: str, context: int | None) -> None:
    """UserError where a backend cannot do what tasks want: generation has their generation_kwargs by their names.

    context: the model's, in tokens; None where it is not known before it is loaded.
    """
    for name, given in generation.items():
        try:
            settings = GenerationSettings.of(given)
            settings.check(backend)
            if context is not None:
                room_for_prompt(context, settings.most)
        except UserError as error:
            raise UserError(f"task {name}: {error.what}", fix=error.fix) from None


def ends(directory: Path) -> tuple[int, ...]:
    """Tokens after which transformers ends a text of this model, beside the tokenizer's own end of text."""
    generation = read_json(directory / "generation_config.json")
    found = (generation if isinstance(generation, dict) else read_json(directory / "config.json") or {}).get(
        "eos_token_id"
    )
    return tuple(token for token in (found if isinstance(found, list) else [found]) if isinstance(token, int))


def check_model(directory: Path) -> None:
    """UserError where a model's generation_config.json asks transformers for what the native backend cannot do.

    What it says of drawing is not asked: a task says whether and how its texts are drawn.
    """
    path = directory / "generation_config.json"
    given = read_json(path)
    kept = {k: v for k, v in given.items() if k in NEUTRAL and k not in OF_DRAWING} if isinstance(given, dict) else {}
    try:
        GenerationSettings.of(kept).check("native")
    except UserError as error:
        raise UserError(f"{path}: {error.what}", fix=f"{error.fix}, or leave the setting out") from None


def room_for_prompt(context: int, generated: int) -> int:
    """Tokens that a prompt may have where `generated` follow it; UserError where there are none."""
    room = context - generated
    if room <= 0:
        raise UserError(
            f"up to {generated} tokens are generated, the model's context is {context}",
            fix="leave the task out, or use a model with a longer context",
        )
    return room


def _check_range(name: str, value: Any, backend: str) -> None:
    ranges = RANGES | OF_VLLM if backend == "vllm" else RANGES
    if name not in ranges:
        return
    lowest, highest = ranges[name]
    is_number = isinstance(value, int if name in WHOLE else (int, float)) and not isinstance(value, bool)
    if not is_number or not lowest <= value <= highest or value == math.inf:
        number = "a whole number" if name in WHOLE else "a number"
        least = f"above 0 and up to {highest}" if lowest == TINY else f"from {lowest} to {highest}"
        limits = least if highest < math.inf else "above 0" if lowest == TINY else f"of {lowest} or more"
        raise UserError(f"generation setting {name}={value!r}", fix=f"give {number} {limits}")


def _known(backend: str) -> list[str]:
    """The names that a backend has, other than those of `GenerationSettings`; native's are none."""
    if backend == "vllm":
        return list(KNOWN_TO_VLLM)
    if backend == "native":
        return []
    from transformers import GenerationConfig

    return sorted(n for n in vars(GenerationConfig()) if not n.startswith("_") and n not in OF_LM_EVAL)


def _length(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = 0
    if number < 1 or isinstance(value, bool):
        raise UserError(f"generation setting {name}={value!r}", fix="give 1 or more tokens")
    return number


def _temperature(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf or isinstance(value, bool):
        raise UserError(f"generation setting temperature={value!r}", fix="give 0 or more")
    if 0 < number < TINY:  # logits divided by less are no numbers
        raise UserError(f"generation setting temperature={value!r}", fix=f"give 0, or {TINY:g} or more")
    return number


def _stops(value: Any) -> tuple[str, ...]:
    """The strings of `until`. One that is empty would end every text before it began."""
    stops = value if isinstance(value, list | tuple) else [value]
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise UserError(f"generation setting until={value!r}", fix="give strings that are not empty, in a list")
    return tuple(stops)
