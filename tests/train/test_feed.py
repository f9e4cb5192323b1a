"""The thread that reads ahead: its order, its errors, its end, and buffers that are not written while they are in use."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from train.batch import host_arrays
from train.feed import BUFFERS, Buffer, Feed

CPU = torch.device("cpu")


def numbered(batch: int, micro_step: int) -> dict[str, np.ndarray]:
    return {"ids": np.full((2, 8), 10 * batch + micro_step, dtype=np.int64)}


def test_what_is_asked_for_is_what_comes_whatever_the_order():
    feed = Feed(numbered, 3, CPU)
    asked = [(b, m) for b in range(4) for m in range(3)]
    asked += [(2, 0), (2, 1), (9, 0), (9, 1), (9, 2), (10, 0)]  # a rewind; batches left out
    for batch, micro_step in asked:
        assert feed.take(batch, micro_step)["ids"].tolist() == numbered(batch, micro_step)["ids"].tolist()
    feed.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "feed"]
    assert feed.take(1, 2)["ids"][0, 0] == 12  # begins anew
    feed.close()


def test_it_reads_ahead_and_leaves_alone_what_is_in_use():
    read = []

    def read_and_note(batch, micro_step):
        read.append((batch, micro_step))
        return numbered(batch, micro_step)

    feed = Feed(read_and_note, 2, CPU)
    in_use = feed.take(0, 0)["ids"]
    deadline = time.monotonic() + 20
    while len(read) < BUFFERS and time.monotonic() < deadline:
        time.sleep(0.001)
    assert read == [(0, 0), (0, 1)]  # the next one, while this one is computed on, and no more
    assert in_use.unique().tolist() == [0]
    assert feed.take(0, 1)["ids"].unique().tolist() == [1]
    feed.close()


def test_errors_of_the_thread_are_raised_as_themselves_where_the_batch_is_needed():
    def broken_at_one(batch, micro_step):
        if batch == 1:
            raise OSError(5, "the disk is gone")
        return numbered(batch, micro_step)

    feed = Feed(broken_at_one, 2, CPU)
    assert feed.take(0, 0)["ids"][0, 0] == 0
    assert feed.take(0, 1)["ids"][0, 0] == 1
    with pytest.raises(OSError, match="the disk is gone"):
        feed.take(1, 0)
    assert feed.take(2, 0)["ids"][0, 0] == 20
    feed.close()


def test_a_buffer_is_reused_for_other_shapes_and_kinds():
    buffer = Buffer(pinned=False)
    first = buffer.fill({"ids": np.arange(12, dtype=np.int64).reshape(3, 4)})["ids"]
    again = buffer.fill({"ids": np.arange(6, dtype=np.int64).reshape(2, 3)})["ids"]
    assert again.data_ptr() == first.data_ptr()
    assert again.tolist() == [[0, 1, 2], [3, 4, 5]]
    larger = buffer.fill({"ids": np.ones((5, 5), dtype=np.int64), "positions": np.zeros((1, 5), dtype=np.int32)})
    assert larger["ids"].sum() == 25
    assert larger["positions"].dtype == torch.int32


def test_the_training_asks_for_targets_while_the_thread_reads(stores):
    """Two threads of one mixture, in blocks of samples that push one another out of the memory of the order."""
    from tinyllama.data.loader import Mixture, Source

    sources = [Source("prose", stores / "prose", 7), Source("code", stores / "code", 3)]
    mixture, alone = Mixture(sources, 64, 1), Mixture(sources, 64, 1)
    feed = Feed(lambda b, m: host_arrays(*mixture.fetch(range(9001 * b, 9001 * b + 4)), mixture.separator_id), 1, CPU)
    for batch in range(40):
        inputs = feed.take(batch, 0)
        assert mixture.num_targets(range(7001 * batch, 7001 * batch + 300)) == alone.num_targets(
            range(7001 * batch, 7001 * batch + 300)
        )
        ids, targets = alone.fetch(range(9001 * batch, 9001 * batch + 4))
        assert np.array_equal(inputs["ids"], ids)
        assert np.array_equal(inputs["targets"], targets)
        assert set(inputs) == {"ids", "targets", "documents", "positions"}
    feed.close()
