"""Stage 5: our own evaluation on the checkpoint of stage 4, against transformers' Llama on the same weights.

Synthetic multiple choice: contexts and endings are pieces of the packed text. In float32 both must give the same scores; in
bfloat16 ours may be as far from float32 as transformers' are, twice at most, and both say how many items a second.
"""

from __future__ import annotations

import dataclasses
import gc
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from device_under_test import Processor, find_device

from evalsuite.budget import budget_of
from evalsuite.scoring import Continuation, Work, log_likelihoods
from gpu_day.rows import FAILED, OK, SKIPPED
from gpu_day.sizes import Around, around
from gpu_day.training import folder_of
from tinyllama import checkpoint
from tinyllama.data.store import TokenStore
from tinyllama.model.config import ModelConfig

ENDINGS = 4
FLOAT32_TOLERANCE = 1e-2  # of a sum of up to 30 log-probabilities of about -10 each
BF16_FACTOR = 2.0


def make_items(data: Path, count: int) -> list[Continuation]:
    """ENDINGS requests per item, item after item: contexts of 40 to 100 tokens, endings of 8 to 30."""
    store = TokenStore(data / "slimpajama", "train")
    tokens = np.empty(min(store.num_tokens, 200_000), dtype=store.dtype)
    store.read_into(0, tokens)
    generator = random.Random(5)

    def piece(shortest: int, longest: int) -> list[int]:
        length = generator.randint(shortest, longest)
        start = generator.randrange(len(tokens) - length)
        return [int(token) for token in tokens[start : start + length]]

    found = []
    for _ in range(count):
        context = piece(40, 100)
        for _ in range(ENDINGS):
            ending = piece(8, 30)
            found.append(Continuation((context + ending)[:-1], ending))
    return found


def theirs_on(weights: dict[str, torch.Tensor], config: ModelConfig, device: Processor) -> torch.nn.Module:
    """transformers' model in float32 with these weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    values = {
        key: value for key, value in config.to_hf(dtype="float32").items() if key not in ("architectures", "model_type")
    }
    with device.torch_device:
        model = LlamaForCausalLM(LlamaConfig(**values, attn_implementation="sdpa"))
    model.load_state_dict(weights, strict=True)
    return model.eval()


@torch.no_grad()
def their_scores(
    model: torch.nn.Module, wanted: Sequence[Continuation], batch: int, device: Processor
) -> list[tuple[float, bool]]:
    """As lm-eval's HFLM has it: longest first, a batch at a time, padded on the right, log-softmax in float32."""
    order = sorted(range(len(wanted)), key=lambda index: -len(wanted[index].read))
    found: list[tuple[float, bool]] = [(0.0, False)] * len(wanted)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        rows = [torch.tensor(wanted[index].read) for index in chosen]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device.torch_device)
        logits = model(input_ids=ids, use_cache=False).logits.float()
        for row, index in enumerate(chosen):
            request = wanted[index]
            end = len(request.read)
            own = logits[row, end - len(request.targets) : end].log_softmax(-1)
            targets = torch.tensor(request.targets, device=own.device)
            total = own.gather(1, targets[:, None]).sum()
            found[index] = (total, (own.argmax(-1) == targets).all())  # type: ignore[assignment]
    return [(float(total), bool(greedy)) for total, greedy in found]


def our_scores(model: Any, wanted: list[Continuation], device: Processor) -> tuple[list[tuple[float, bool]], Work]:
    """By our own evaluation."""
    work = Work()
    return log_likelihoods(model, wanted, budget_of(model, device.memory_bytes()[0]), work), work


def sums(scores: Sequence[tuple[float, bool]]) -> np.ndarray:
    return np.array([total for total, _ in scores])


def chosen_endings(scores: np.ndarray) -> np.ndarray:
    """The likeliest ending of each item."""
    return scores.reshape(-1, ENDINGS).argmax(1)


def timed(device: Processor, work: Any, warm: Any) -> tuple[Any, float, float]:
    """What `work` gives, the seconds of `warm` (which compiles and plans), and its own seconds after that."""
    began = time.perf_counter()
    warm()
    device.synchronize()
    between = time.perf_counter()
    found = work()
    device.synchronize()
    return found, between - began, time.perf_counter() - between


@dataclasses.dataclass
class Comparison:
    """Both models on one checkpoint."""

    here: Around
    device: Processor

    def load(self) -> tuple[str, dict[str, Any]]:
        """Both in float32 on the device."""
        began = time.perf_counter()
        folder = folder_of(self.here)
        self.ours, _ = checkpoint.load_model(folder, "float32")
        self.ours.to(self.device.torch_device)
        ours_s = time.perf_counter() - began
        directory = checkpoint.resolve(folder)
        weights = dict(checkpoint.read_weights(directory))
        self.theirs = theirs_on(weights, self.ours.config, self.device)
        self.wanted = make_items(self.here.data, self.here.sizes.items)
        self.exact = self.wanted[: self.here.sizes.exact_items * ENDINGS]
        seconds = time.perf_counter() - began
        return f"{seconds:.1f} s, ours {ours_s:.1f}", {
            "seconds": seconds,
            "ours_s": ours_s,
            "requests": len(self.wanted),
        }

    def float32(self) -> tuple[str, dict[str, Any]]:
        """The first items; scores must be equal up to the order of sums."""
        batch = self.here.sizes.score_batch
        self.exact_scores = sums(their_scores(self.theirs, self.exact, batch, self.device))
        ours = sums(our_scores(self.ours, self.exact, self.device)[0])
        apart = float(np.abs(ours - self.exact_scores).max())
        differing = int((chosen_endings(ours) != chosen_endings(self.exact_scores)).sum())
        good = apart <= FLOAT32_TOLERANCE and differing == 0
        values = {"largest_difference": apart, "allowed": FLOAT32_TOLERANCE, "items_differing": differing}
        return f"largest difference {apart:.1e}, {differing} items differ", {**values, "status": OK if good else FAILED}

    def native_bf16(self) -> tuple[str, dict[str, Any]]:
        """All items by our own evaluation."""
        self.ours.bfloat16()
        (scores, work), warm_s, seconds = timed(
            self.device,
            lambda: our_scores(self.ours, self.wanted, self.device),
            lambda: our_scores(self.ours, self.exact, self.device),
        )
        self.native = sums(scores)
        self.device.empty_cache()
        rate = self.here.sizes.items / seconds
        values = {"items_per_s": rate, "seconds": seconds, "warm_s": warm_s, "work": dataclasses.asdict(work)}
        return f"{rate:,.0f} items/s", values

    def transformers_bf16(self) -> tuple[str, dict[str, Any]]:
        """All items by transformers; its rotary table stays in float32, as when it loads a model in bfloat16."""
        for parameter in self.theirs.parameters():
            parameter.data = parameter.data.bfloat16()
        gc.collect()
        self.device.empty_cache()
        batch = self.here.sizes.score_batch
        scores, warm_s, seconds = timed(
            self.device,
            lambda: their_scores(self.theirs, self.wanted, batch, self.device),
            lambda: their_scores(self.theirs, self.exact, batch, self.device),
        )
        self.transformers = sums(scores)
        rate = self.here.sizes.items / seconds
        return f"{rate:,.0f} items/s", {"items_per_s": rate, "seconds": seconds, "warm_s": warm_s, "batch": batch}

    def bf16(self) -> tuple[str, dict[str, Any]]:
        """Both in bfloat16 against float32 on the first items, and against each other on all."""
        few = len(self.exact)

        def error(scores: np.ndarray) -> float:
            return float(np.sqrt(np.mean((scores[:few] - self.exact_scores) ** 2)))

        ours, theirs = error(self.native), error(self.transformers)
        same = float((chosen_endings(self.native) == chosen_endings(self.transformers)).mean())
        apart = float(np.abs(self.native - self.transformers).max())
        values = {
            "native_rms_error": ours,
            "transformers_rms_error": theirs,
            "allowed_factor": BF16_FACTOR,
            "same_ending_frac": same,
            "largest_difference": apart,
            "status": OK if ours <= BF16_FACTOR * theirs else FAILED,
        }
        return f"error against float32 {ours:.3f}, transformers' {theirs:.3f}; same ending in {same:.1%}", values


def main() -> None:
    here, device = around(), find_device()
    comparison = Comparison(here, device)
    rows = (
        ("evaluation, load", comparison.load),
        ("evaluation, float32", comparison.float32),
        ("evaluation, native bf16", comparison.native_bf16),
        ("evaluation, transformers bf16", comparison.transformers_bf16),
        ("evaluation, bf16 against float32", comparison.bf16),
    )
    failed: list[str] = []
    for name, work in rows:
        # What needs what: all need both models, the last needs the three before it.
        if rows[0][0] in failed or (failed and name == rows[-1][0]):
            here.rows.add(name, SKIPPED, reason=f"{failed[0]} failed")
        elif here.rows.measure(name, work) is None:
            failed.append(name)


if __name__ == "__main__":
    main()
