"""Before the scores of a converted model count: it must give the log-probabilities and greedy tokens of the model itself.

Two implementations of the same weights are compared on sample prompts: the backend that will be evaluated, and the other one
(ours for hf and vllm, transformers' for native). An export that was proven when it was written is not proven again.
A checkpoint needs nothing: no conversion lies between it and its scores. Quantized weights are other weights, and hub models
have no files here to compare with: not compared, and the results say so.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from evalsuite import backends
from evalsuite.backends import ModelChoice
from tinyllama.errors import ConfigError, UserError, first_line
from tinyllama.model import tokenizer_files
from tinyllama.model.config import ModelConfig

PROMPTS = (
    "The history of the town begins with the river. Traders who came down it every spring needed a place to store their",
    "def mean(values):\n    if not values:\n        raise ValueError('no values')\n    total = 0\n    for value in",
    "Question: What is 17 + 25?\nAnswer: 42\n\nQuestion: What is 36 + 28?\nAnswer: 64\n\nQuestion: What is 9 + 14?\nAnswer:",
    "Zürich, São Paulo, Århus und Kraków: 4 cities — “quoted”, naïve café… \u6771\u4eac \u20ac12.50",
)
HEAD = "lm_head.weight"
POSITIONS, GREEDY_TOKENS, SHORTEST = 16, 8, 4
# Largest difference of a log-probability, from the same in float32: rounding, with room. A wrong conversion is far off.
TOLERANCE = {"float32": 2e-3, "float16": 0.1, "bfloat16": 0.4}


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the other implementation says: for each context its next token, that token's log-probability and its lead.

    lead: by how much it is more likely than any other token, below 0 where it is not the most likely one.
    """

    against: str
    contexts: list[list[int]]
    tokens: list[int]
    logprobs: list[float]
    leads: list[float]


def not_compared(choice: ModelChoice, content_sha256: str) -> dict[str, Any] | None:
    """Why this model needs no comparison, as results.json says it; None where it needs one."""
    if not choice.local:
        return {"compared": False, "reason": "a hub model: no files here"}
    if choice.source.is_checkpoint:
        return {"compared": False, "reason": "a checkpoint: not converted"}
    config = choice.source.config
    if config.get("quantization_config"):
        return {"compared": False, "reason": "quantized weights are other weights"}
    if config.get("model_type") != "llama":
        return {"compared": False, "reason": f"not a Llama but {config.get('model_type')}"}
    if choice.backend != "native":
        try:
            _our_config(Path(choice.path))
        except ConfigError as error:
            return {"compared": False, "reason": f"a Llama that ours does not compute ({error.what})"}
    if choice.backend == "native":
        found = choice.source.record()
        if found.get("content_sha256") == content_sha256 and found.get("logits_difference") is not None:
            return {
                "compared": True,
                "with": "transformers, when it was exported",
                "largest_logit_difference": found["logits_difference"],
            }
    return None


def expected(choice: ModelChoice) -> Expected:
    """Ask the other implementation. Its memory is given back."""
    tokenizer = tokenizer_files.load(choice.path)
    against, logits_of, vocabulary = _reference(choice)
    contexts, tokens, logprobs, leads = [], [], [], []
    room = backends.context(choice) or max(map(len, PROMPTS)) + GREEDY_TOKENS
    room -= choice.backend == "vllm"  # which keeps one for a token that nobody asked for
    for prompt in PROMPTS:
        ids = [i for i in tokenizer(prompt).input_ids if i < vocabulary]
        if len(ids) < SHORTEST:
            continue
        ids = ids[: max(1, room - GREEDY_TOKENS)]
        stride = max(1, (len(ids) - 1) // POSITIONS)
        positions = list(range(1, len(ids), stride))
        for _ in range(min(GREEDY_TOKENS, room)):
            positions.append(len(ids))
            ids.append(int(logits_of(ids)[-1].argmax()))
        scores = logits_of(ids).log_softmax(-1)
        for at in positions:
            others = scores[at - 1].clone()
            others[ids[at]] = float("-inf")
            contexts.append(ids[:at])
            tokens.append(ids[at])
            logprobs.append(float(scores[at - 1, ids[at]]))
            leads.append(float(scores[at - 1, ids[at]] - others.max()))
    if not contexts:
        raise UserError(
            f"the tokenizer of {choice.path} has no tokens for the sample prompts of the comparison",
            fix="check it, or use --no-parity-check",
        )
    return Expected(against, contexts, tokens, logprobs, leads)


def _reference(choice: ModelChoice) -> tuple[str, Callable[[list[int]], Any], int]:
    """The other implementation: its name, ids to fp32 logits (T, V), and V."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if choice.backend == "native":
        from transformers import AutoModelForCausalLM

        from evalsuite.budget import is_out_of_memory

        try:
            theirs = AutoModelForCausalLM.from_pretrained(choice.path, dtype=torch.float32).to(device).eval()
            theirs(torch.zeros(1, 1, dtype=torch.long, device=device))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"transformers cannot run it ({first_line(error)[:200]})", fix="correct its config.json"
            ) from error

        def transformers_logits(ids: list[int]) -> Any:
            with torch.no_grad():
                return theirs(torch.tensor([ids], device=device)).logits[0].cpu()

        return "transformers", transformers_logits, int(theirs.config.vocab_size)
    ours = _ours(Path(choice.path), device)

    def our_logits(ids: list[int]) -> Any:
        with torch.no_grad():
            return ours(torch.tensor([ids], device=device))[0].cpu()

    return "native", our_logits, ours.config.vocab_size


def _our_config(directory: Path) -> ModelConfig:
    """The shape of a Llama whose logits ours can compute: of a head that is tied to the embedding it has a copy, and null
    stands for a default.
    """
    raw = json.loads((directory / "config.json").read_text())
    plain = {name: value for name, value in raw.items() if value is not None} | {"tie_word_embeddings": False}
    with tempfile.TemporaryDirectory(prefix="tinyllama-parity-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(plain))
        try:
            return ModelConfig.from_hf(folder)
        except ConfigError as error:
            raise ConfigError(error.what.replace(folder, str(directory)), fix=error.fix) from None


def _ours(directory: Path, device: str) -> Any:
    """Our implementation of a directory's weights, in float32."""
    import torch

    from tinyllama.model.hf import fill, read_tensors
    from tinyllama.model.llama import Llama

    tied = json.loads((directory / "config.json").read_text()).get("tie_word_embeddings")

    def tensors() -> Iterator[tuple[str, Any]]:
        for name, tensor in read_tensors(directory):
            if not (tied and name == HEAD):
                yield name, tensor
            if tied and name == "model.embed_tokens.weight":
                yield HEAD, tensor

    with torch.device("meta"):
        model = Llama(_our_config(directory))
    model = model.to_empty(device=device).float()
    fill(model, tensors(), str(directory))
    return model.eval()


def compare(model: Any, wanted: Expected, choice: ModelChoice) -> dict[str, Any]:
    """What results.json says of it; UserError where the two are not the same model.

    model: lm-eval's object. A token that only one of the two finds most likely is a difference where the other's lead is
    more than rounding can take.
    """
    requests = [(None, context, [token]) for context, token in zip(wanted.contexts, wanted.tokens, strict=True)]
    truncated = getattr(model, "num_truncated", None)
    found = model._loglikelihood_tokens(requests)
    if truncated is not None:
        model.num_truncated = truncated
    tolerance = TOLERANCE[choice.dtype]
    largest = max(abs(a - b) for (a, _), b in zip(found, wanted.logprobs, strict=True))
    other_tokens = sum(
        greedy != (lead > 0) and abs(lead) > 2 * tolerance
        for (_, greedy), lead in zip(found, wanted.leads, strict=True)
    )
    if not largest <= tolerance or other_tokens:  # also catches NaN
        raise UserError(
            f"{choice.path}: {choice.backend} and {wanted.against} do not compute the same model: log-probabilities "
            f"differ by up to {largest:.3g} (tolerance {tolerance:g}), {other_tokens} of {len(found)} greedy tokens differ",
            fix="use another --backend, or --no-parity-check to publish scores that may not be this model's",
        )
    return {
        "compared": True,
        "with": wanted.against,
        "positions": len(found),
        "greedy_positions": sum(lead > 0 for lead in wanted.leads),
        "largest_logprob_difference": largest,
        "tolerance": tolerance,
    }


def sentence(found: dict[str, Any]) -> str:
    """A comparison as the tables tell it, or why there was none."""
    if not found["compared"]:
        return f"not checked against another implementation: {found['reason']}"
    return (
        f"checked against {found['with']}: {found['positions']} log-probabilities, "
        f"{found['greedy_positions']} greedy tokens, largest difference {found['largest_logprob_difference']:.1e}"
    )
