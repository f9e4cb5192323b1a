"""Validation loss and bits per byte of each source, averaged over all ranks by tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tinyllama.data.loader import HeldOut
from train.batch import model_inputs

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from train.text_bytes import TextBytes


def held_out_loss(
    engine: DeepSpeedEngine,
    source: HeldOut,
    max_windows: int,
    *,
    micro: int,
    separator_id: int | None,
    device: Any,
    beat: Callable[[str], None],
) -> tuple[float, int]:
    """Summed loss and number of targets of a source's first windows, over all ranks; collective.

    Every rank runs the same number of forward passes (windows past the end carry no targets), as ZeRO-3 needs.
    beat: called before each of them, as a sign of life.
    """
    import torch
    import torch.distributed as dist

    rank, ranks = dist.get_rank(), dist.get_world_size()
    windows = min(source.num_windows, max_windows)
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    engine.eval()
    with torch.no_grad():
        for start in range(0, windows, micro * ranks):
            beat("validate")
            first = start + rank * micro
            mine = [n if n < windows else source.num_windows for n in range(first, first + micro)]
            ids, targets = source.fetch(mine)
            loss = engine(**model_inputs(ids, targets, separator_id, device))
            totals[0] += loss.double()  # read at the end: the host need not wait for the device before
            totals[1] += float((targets >= 0).sum())
    engine.train()
    dist.all_reduce(totals)
    loss_sum, count = totals.tolist()
    return loss_sum, int(count)


def validate(
    engine: DeepSpeedEngine, held_out: list[HeldOut], max_sequences: int, text_bytes: TextBytes, **forward: Any
) -> dict[str, dict[str, float | None]]:
    """Per source: loss (nats per token) and bits_per_byte over at most `max_sequences` windows; collective.

    bits_per_byte: over the text of the windows that were scored; None where nothing says how many bytes that is.
    forward: the further arguments of `held_out_loss`.
    """
    results: dict[str, dict[str, float | None]] = {}
    for source in held_out:
        loss_sum, count = held_out_loss(engine, source, max_sequences, **forward)
        if count:
            size = text_bytes.of(source, max_sequences)
            results[source.name] = {
                "loss": loss_sum / count,
                "bits_per_byte": loss_sum / math.log(2) / size if size else None,
                "targets": count,
            }
    return results
