"""Any corpus, any number of ranks: nothing lost, nothing added, one order, and a resume that is a seek."""

from __future__ import annotations

import gzip
import json
import math
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyllama.data.loader import IGNORE_INDEX, Mixture, Source
from tinyllama.data.prepare import prepare
from tinyllama.data.store import TokenStore, verify
from tinyllama.tokenizer.sentencepiece_model import Tokenizer
from train.plan import BatchPlan

RANKS = (1, 2, 3, 8)
# As a list of pieces: in one alphabet with all of Unicode, the few that matter would hardly ever be drawn.
PIECES = [*"ab .é世🙂▁\n\r\t\0\u200d", "  ", "e\u0301", "▁a", "<s>", "</s>", "<unk>"]
TEXT = st.lists(
    st.one_of(st.sampled_from(PIECES), st.text(st.characters(codec="utf-8"), min_size=1, max_size=3)),
    min_size=1,
    max_size=40,
).map("".join)
CORPORA = st.lists(st.lists(TEXT, max_size=12), min_size=1, max_size=4).filter(lambda files: any(files))
SETTINGS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tokenizer(tokenizer_model: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_model)


def write(folder: Path, files: list[list[str]]) -> Path:
    """One `.jsonl.gz` a file; some have no document at all."""
    folder.mkdir()
    for number, texts in enumerate(files):
        with gzip.open(folder / f"{number}.jsonl.gz", "wt", compresslevel=1) as stream:
            stream.write("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@given(files=CORPORA, shard_tokens=st.integers(5, 200), fraction=st.sampled_from([0.0, 0.3]))
@SETTINGS
def test_every_document_comes_back_with_exactly_one_separator(tokenizer, files, shard_tokens, fraction):
    with tempfile.TemporaryDirectory() as folder:
        root, texts = Path(folder), [text for file in files for text in file]
        # One document that is surely in the training split, so that there is something to train on.
        texts.append(next(t for t in map("anchor {}".format, range(99)) if not held_out(t, fraction)))
        write(root / "in", [*files, texts[-1:]])
        manifest = prepare(
            [root / "in"],
            root / "store",
            tokenizer,
            validation_fraction=fraction,
            shard_tokens=shard_tokens,
            workers=0,
        )
        verify(root / "store")
        found: Counter[str] = Counter()
        tokens = 0
        for split in ("train", "validation"):
            store = TokenStore(root / "store", split)
            tokens += store.num_tokens
            for document in store.documents():
                assert document[0] == tokenizer.bos_id
                assert (document[1:] != tokenizer.bos_id).all()
                text = tokenizer.decode(document[1:].tolist())
                assert (split == "validation") == held_out(text, fraction)
                found[text] += 1
        # SentencePiece itself cannot tell its space character from a space.
        assert found == Counter(text.replace("▁", " ") for text in texts)
        assert tokens == sum(len(ids) + 1 for ids in tokenizer.encode_batch(texts, 1))
        assert sum(manifest.documents(split) for split in manifest.splits) == len(texts)


def held_out(text: str, fraction: float) -> bool:
    from tinyllama.data.pipeline import is_validation

    # The text as decoding gives it: "▁" is a space there, and texts that differ in that alone are on the same side.
    return is_validation(text.encode(), 1337, fraction)


def mixtures(root: Path, tokenizer: Tokenizer, lengths: list[int], sequence: int) -> list[Source]:
    sources = []
    for number, length in enumerate(lengths):
        text = " ".join(f"w{number}{i}" for i in range(length + sequence))
        write(root / f"in{number}", [[text[: len(text) // 2], text[len(text) // 2 :]]])
        prepare(
            [root / f"in{number}"],
            root / f"s{number}",
            tokenizer,
            validation_fraction=0.0,
            shard_tokens=97,
            workers=0,
        )
        sources.append(Source(f"s{number}", root / f"s{number}", float(number + 1)))
    return sources


@given(
    lengths=st.lists(st.integers(20, 120), min_size=1, max_size=2),
    sequence=st.integers(2, 24),
    accumulation=st.integers(1, 2),
    seed=st.integers(0, 99),
)
@SETTINGS
def test_one_order_for_every_number_of_ranks_and_after_every_resume(tokenizer, lengths, sequence, accumulation, seed):
    with tempfile.TemporaryDirectory() as folder:
        sources = mixtures(Path(folder), tokenizer, lengths, sequence)
        whole = Mixture(sources, sequence, seed)
        batch = 24 * accumulation
        # Enough steps for one epoch of every source.
        shares = [float(share) for share in whole.order.schedule.shares]
        steps = math.ceil(max(w / s for w, s in zip(whole.order.windows, shares, strict=True)) / batch) + 1
        global_order = {}
        ids, targets = whole.fetch(range(steps * batch))
        for sample in range(steps * batch):
            global_order[sample] = (ids[sample].tobytes(), targets[sample].tobytes())
        for ranks in RANKS:
            plan = BatchPlan(24 // ranks if ranks != 8 else 3, accumulation, ranks, sequence)
            assert plan.sequences == batch
            seen: dict[int, tuple[bytes, bytes]] = {}
            resumed_at = steps // 2
            mixture = Mixture(sources, sequence, seed)
            for step in range(steps):
                if step == resumed_at:
                    mixture = Mixture(sources, sequence, seed)  # a new process knows nothing but the step
                for rank in range(ranks):
                    for micro_step in range(accumulation):
                        samples = plan.samples(step, rank, micro_step)
                        got = mixture.fetch(samples)
                        for sample, row, target in zip(samples, *got, strict=True):
                            assert sample not in seen  # ranks are disjoint
                            seen[sample] = (row.tobytes(), target.tobytes())
            assert seen == global_order
        # The union of all ranks: every token of every source is a target exactly once in its first epoch.
        for number, store in enumerate(whole.stores):
            counts = np.zeros(store.num_tokens, dtype=int)
            for sample in range(steps * batch):
                window = whole.order(sample)
                if window.source == number and window.epoch == 0:
                    begin = window.start + 1 + window.repeated
                    counts[begin : window.start + 1 + sequence] += 1
                    expected = store.read(window.start, sequence + 1)
                    row, target = (np.frombuffer(b, dtype=np.int64) for b in global_order[sample])
                    np.testing.assert_array_equal(row, expected[:-1])
                    kept = target[window.repeated :]
                    np.testing.assert_array_equal(kept, expected[1 + window.repeated :])
                    assert (target[: window.repeated] == IGNORE_INDEX).all()
            assert counts[0] == 0
            assert (counts[1:] == 1).all()


def test_three_documents_and_eight_workers_lose_nothing(tmp_path, tokenizer):
    """Faults 1, 2 and 7: shards padded with bos, last chunks dropped, an IndexError with little data."""
    texts = ["first document", "second one", "the third"]
    write(tmp_path / "in", [[text] for text in texts])
    stores = []
    for workers in (0, 8):
        prepare(
            [tmp_path / "in"],
            tmp_path / f"s{workers}",
            tokenizer,
            validation_fraction=0.0,
            workers=workers,
            shard_tokens=7,
        )
        stores.append(TokenStore(tmp_path / f"s{workers}"))
    assert stores[0].manifest.sha256 == stores[1].manifest.sha256
    found = [tokenizer.decode(ids[1:].tolist()) for ids in stores[1].documents()]
    assert found == texts
    mixture = Mixture([Source("a", tmp_path / "s8", 1.0)], 4, 0)
    for ranks in RANKS:
        for rank in range(ranks):
            ids, _ = mixture.fetch(range(rank, rank + 1))
            assert ids.shape == (1, 4)


def test_a_small_validation_split_still_gives_a_batch(tmp_path, tokenizer):
    from tinyllama.data.loader import HeldOut

    texts = [f"text number {i}" for i in range(60)]
    write(tmp_path / "in", [texts])
    prepare([tmp_path / "in"], tmp_path / "store", tokenizer, validation_fraction=0.05, workers=0)
    held = HeldOut(Source("a", tmp_path / "store", 1.0), 2048)
    assert held.store.num_documents >= 1
    ids, targets = held.fetch([0])
    assert ids.shape == (1, 2048)
    assert (targets >= 0).sum() == held.store.num_tokens - 1
