"""Overlap of benchmark items with training data: what was planted is found, nothing else, against a naive count."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import tinyllama
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama.data import contamination
from tinyllama.data.contamination import Item, NgramIndex, report, rolling_hashes
from tinyllama.data.prepare import prepare
from tinyllama.data.store import TokenStore
from tinyllama.tokenizer.sentencepiece_model import Tokenizer

QUESTION = (
    "Which of these planets did the old astronomer of the northern valley observe for thirty years without a rest?"
)
OTHER = (
    "A question about cooking that nobody has ever written down anywhere, least of all in the training data of a model."
)


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_hashes_are_equal_where_runs_are_and_only_there(values, n):
    tokens = np.array(values, dtype="<u2")
    hashes = rolling_hashes(tokens, n)
    runs = [tuple(values[i : i + n]) for i in range(max(0, len(values) - n + 1))]
    assert len(hashes) == len(runs)
    assert len(set(hashes.tolist())) == len(set(runs))
    # The same run has the same hash wherever it stands.
    assert len({(run, h) for run, h in zip(runs, hashes.tolist(), strict=True)}) == len(set(runs))


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_counts_are_those_of_a_naive_search(data):
    n = data.draw(st.integers(1, 5))
    ids = st.lists(st.integers(2, 5), max_size=30)
    fields, stream = (
        data.draw(st.lists(ids, min_size=1, max_size=4)),
        data.draw(st.lists(st.integers(1, 5), max_size=80)),
    )
    ends = np.cumsum([0, *map(len, fields)]).tolist()
    items = [Item("s", "c", "t", i, [(ends[i], ends[i + 1])]) for i in range(len(fields))]
    index = NgramIndex(items, np.array([t for f in fields for t in f], dtype="<u2"), n)
    index.add(index.find(np.array(stream, dtype="<u2")))
    wanted = {tuple(f[i : i + n]) for f in fields for i in range(len(f) - n + 1)}
    expected = Counter(run for i in range(len(stream) - n + 1) if (run := tuple(stream[i : i + n])) in wanted)
    found = {
        tuple(index.tokens[place : place + n].tolist()): int(count)
        for place, count in zip(index.places, index.counts, strict=True)
    }
    assert {run: count for run, count in found.items() if count} == expected
    assert set(found) == wanted


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    rows = [
        {"question": QUESTION, "choices": ["one", "two"], "nested": {"id": "q0"}},
        {"question": OTHER, "choices": ["three"]},
        {"question": "Too short?", "choices": ["yes", "no"]},
    ]
    (folder / "us__quiz" / "default").mkdir(parents=True)
    (folder / "us__quiz" / "default" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def contaminated(bundle: Path, corpus: Path, tokenizer_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contaminated")
    lines = (corpus / "prose.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines[:40]]
    texts.insert(7, f"A forum page.\n{QUESTION}\nThe answer is two.")
    texts.insert(30, f"Copied again: {QUESTION.lower()} And once more: {QUESTION[:60]}")
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(
        [folder / "in.jsonl"],
        folder / "store",
        Tokenizer.load(tokenizer_model),
        validation_fraction=0,
        shard_tokens=5000,
        workers=0,
    )
    return folder / "store"


def test_a_planted_item_is_found_and_no_other(bundle, contaminated, tokenizer_model, monkeypatch):
    tokenizer = Tokenizer.load(tokenizer_model)
    found = report([contaminated], bundle, tokenizer)
    planted, other, short = found["items"]
    assert planted["status"] == "overlap"
    assert planted["overlap_frac"] > 0.8
    assert planted["occurrences"] >= 2
    assert (other["status"], other["matched"]) == ("clean", 0)
    assert short["status"] == "short"
    assert found["sets"] == [
        {"set": "us__quiz/default/test", "items": 3, "clean": 1, "overlap": 1, "short": 1, "overlap_80": 1}
    ]
    # Exactly the 13-grams that a search through the decoded stream finds.
    store = TokenStore(contaminated)
    stream = tuple(store.read(0, store.num_tokens).tolist())
    runs = {stream[i : i + 13] for i in range(len(stream) - 12)}
    ids = tokenizer.encode(QUESTION)
    assert planted["matched"] == sum(tuple(ids[i : i + 13]) in runs for i in range(len(ids) - 12))
    # Pieces of any size, any number of threads, more than one store: the same counts.
    monkeypatch.setattr(contamination, "CHUNK_TOKENS", 37)
    for threads in (1, 3):
        assert report([contaminated], bundle, tokenizer, threads=threads)["items"] == found["items"]
    twice = report([contaminated, contaminated], bundle, tokenizer)["items"][0]
    assert twice == {**planted, "occurrences": 2 * planted["occurrences"]}


def test_the_command_writes_a_report_and_a_table(bundle, contaminated, tokenizer_model, tmp_path):
    arguments = ["data", "contamination", contaminated, "--against", bundle, "--tokenizer", tokenizer_model]
    done = tinyllama(*arguments, "--output", tmp_path / "report.json")
    assert "us__quiz/default/test" in done.stdout
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["format"] == "tinyllama-contamination-1"
    assert [item["status"] for item in found["items"]] == ["overlap", "clean", "short"]
    machine = json.loads(tinyllama(*arguments, "--output", tmp_path / "r2.json", "--json").stdout)
    assert machine["sets"] == found["sets"]
    assert machine["stores"][0]["training_tokens"] == TokenStore(contaminated).num_tokens


def test_the_shipped_bundle_can_be_checked(contaminated, tokenizer_model, tmp_path):
    arguments = ["data", "contamination", contaminated, "--against", "mini", "--tokenizer", tokenizer_model]
    found = json.loads(tinyllama(*arguments, "--output", tmp_path / "r.json", "--json").stdout)
    assert sum(entry["items"] for entry in found["sets"]) > 500


@pytest.mark.parametrize("mistake", ["bundle", "tokenizer", "ngram", "corrupt"])
def test_mistakes_are_one_line(bundle, contaminated, tokenizer_model, tmp_path, mistake):
    other = tmp_path / "other" / "tokenizer.model"
    other.parent.mkdir()
    data = tokenizer_model.read_bytes()
    against: object = bundle
    model, ngram, words = tokenizer_model, "13", ""
    if mistake == "bundle":
        against, words = tmp_path / "nothing", "bundle"
    elif mistake == "tokenizer":
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(data)
        proto.pieces[-1].score -= 1
        other.write_bytes(proto.SerializeToString())
        model, words = other, "did not make"
    elif mistake == "ngram":
        ngram, words = "0", "13 is usual"
    else:
        (tmp_path / "b" / "x" / "y").mkdir(parents=True)
        (tmp_path / "b" / "x" / "y" / "test.jsonl").write_text("{")
        against, words = tmp_path / "b", "is corrupt"
    arguments = ["data", "contamination", contaminated, "--against", against, "--tokenizer", model, "--ngram", ngram]
    done = tinyllama(*arguments, "--output", tmp_path / "r.json", check=False)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert not (tmp_path / "r.json").exists()
