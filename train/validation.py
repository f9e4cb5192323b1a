"""Validation loss and bits per byte of each source, averaged over all ranks by tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tinyllama.data.loader import HeldOut
from train.batch import model_inputs

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def validate(
    engine: DeepSpeedEngine,
    held_out: list[HeldOut],
    max_sequences: int,
    micro: int,
    separator_id: int | None,
    device: Any,
) -> dict[str, dict[str, float]]:
    """Per source: loss (nats per token) and bits_per_byte over at most `max_sequences` windows; collective.

    Every rank runs the same number of forward passes (windows past the end carry no targets), as ZeRO-3 needs.
    """
    import torch
    import torch.distributed as dist

    rank, ranks = dist.get_rank(), dist.get_world_size()
    engine.eval()
    results = {}
    with torch.no_grad():
        for source in held_out:
            windows = min(source.num_windows, max_sequences)
            totals = torch.zeros(2, dtype=torch.float64)
            for start in range(0, windows, micro * ranks):
                first = start + rank * micro
                mine = [n if n < windows else source.num_windows for n in range(first, first + micro)]
                ids, targets = source.fetch(mine)
                loss = engine(**model_inputs(ids, targets, separator_id, device))
                totals += torch.tensor([loss.item(), float((targets >= 0).sum())], dtype=torch.float64)
            totals = totals.to(device)
            dist.all_reduce(totals)
            loss_sum, count = totals.tolist()
            if count:
                tokens_per_byte = source.store.num_tokens / max(1, source.bytes_of_text)
                loss = loss_sum / count
                results[source.name] = {
                    "loss": loss,
                    "bits_per_byte": loss / math.log(2) * tokens_per_byte,
                    "targets": int(count),
                }
    engine.train()
    return results
