"""The shapes of the day: what a GPU is given, and the same in miniature for a CPU. And what a part finds around itself."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path

from gpu_day.rows import Rows
from tinyllama.model.config import ModelConfig

TINY_MODEL = {
    "vocab_size": 32000,  # the packed tokenizer's
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of every stage. settings: `--set` of the training runs beside the recipe."""

    name: str
    matmul: int  # rows and columns
    copy_bytes: int
    repeats: int
    attention: tuple[int, int, int, int, int]  # batch, query heads, key and value heads, length, width of a head
    model: ModelConfig
    sequence_length: int
    micro: int
    step_tokens: int
    reproduce_steps: int
    reproduce_settings: tuple[str, ...]
    train_total_steps: int
    train_steps: int  # after which it is stopped
    train_settings: tuple[str, ...]
    save_s: float  # kept for the checkpoint after the signal
    items: int  # of the evaluation, four endings each
    exact_items: int  # of these, scored in float32 as well
    score_batch: int  # sequences of a pass of transformers


def run_settings(batch_tokens: int, steps: int, *more: str) -> tuple[str, ...]:
    """Settings of a short run of any recipe."""
    return (
        f"training.batch_tokens={batch_tokens}",
        f"training.tokens={batch_tokens * steps}",
        f"optimizer.warmup_steps={min(5, steps // 2)}",
        "validation.max_sequences=4",
        *more,
    )


FULL = Sizes(
    name="full",
    matmul=8192,
    copy_bytes=2**31,
    repeats=20,
    attention=(8, 32, 4, 2048, 64),
    model=ModelConfig(),
    sequence_length=2048,
    micro=8,
    step_tokens=65536,
    reproduce_steps=20,
    reproduce_settings=run_settings(65536, 20),
    train_total_steps=40,
    train_steps=25,
    train_settings=run_settings(65536, 40, "training.log_every_steps=5"),
    save_s=60,
    items=2000,
    exact_items=100,
    score_batch=64,
)
_TINY = (*(f"model.{key}={value}" for key, value in TINY_MODEL.items()), "data.sequence_length=64")
TINY = Sizes(
    name="tiny",
    matmul=256,
    copy_bytes=2**24,
    repeats=3,
    attention=(1, 4, 2, 128, 16),
    model=ModelConfig(**TINY_MODEL),
    sequence_length=64,
    micro=2,
    step_tokens=512,
    reproduce_steps=4,
    reproduce_settings=run_settings(256, 4, *_TINY),
    train_total_steps=4000,
    train_steps=5,
    train_settings=run_settings(256, 4000, "training.log_every_steps=1", *_TINY),
    save_s=20,
    items=24,
    exact_items=24,
    score_batch=16,
)


@dataclasses.dataclass(frozen=True)
class Around:
    """What `conduct.py` hands to a part: where its rows go, where to work, how long it may take, how large to be."""

    rows: Rows
    part: str
    work: Path
    data: Path
    end: float  # seconds since 1970
    sizes: Sizes

    def left_s(self) -> float:
        """Seconds until this process is killed."""
        return self.end - time.time()


def around() -> Around:
    """From the arguments (stage, part) and the environment."""
    stage, part = int(sys.argv[1]), sys.argv[2]
    environment = os.environ
    return Around(
        Rows(Path(environment["GPU_DAY_ROWS"]), stage, part),
        part,
        Path(environment["GPU_DAY_WORK"]),
        Path(environment["GPU_DAY_DATA"]),
        float(environment["GPU_DAY_END"]),
        TINY if environment["GPU_DAY_SHAPE"] == "tiny" else FULL,
    )
