"""Exported tokenizers: ids that equal SentencePiece's on everything, or nothing is written."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import LLAMA2, tinyllama
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama.errors import UserError
from tinyllama.tokenizer.export import check_texts, export_hf, merges, read_pieces, tokenizer_json, unproven, verify_hf
from tinyllama.tokenizer.sentencepiece_model import Tokenizer, parse
from tinyllama.tokenizer.train import train


def standard_library() -> list[str]:
    """Every .py file of the standard library that is UTF-8, its tests included."""
    texts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts:
            try:
                texts.append(path.read_bytes().decode("utf-8"))
            except UnicodeDecodeError:
                continue
    return texts


@pytest.fixture(scope="module")
def thousand(corpus, tmp_path_factory):
    """A tokenizer.model of 1000 pieces, trained on what CPython ships."""
    path = tmp_path_factory.mktemp("thousand") / "tokenizer.model"
    train([corpus], path, 1000)
    return path


@pytest.fixture(scope="module", params=["llama2", "trained"])
def pair(request, thousand, tmp_path_factory):
    """(tokenizer.model, its export) of Llama 2's real tokenizer, and of one trained here."""
    if request.param == "llama2" and not LLAMA2.exists():
        pytest.skip("Llama 2's tokenizer.model is not part of this project (../shared/tokenizer is absent)")
    model = LLAMA2 if request.param == "llama2" else thousand
    target = tmp_path_factory.mktemp("hf") / request.param
    report = export_hf(model, target)
    assert report["checked"]["texts"] > 800
    return model, target


@pytest.fixture(scope="module")
def both(pair):
    from transformers import AutoTokenizer

    return Tokenizer.load(pair[0]), AutoTokenizer.from_pretrained(pair[1])


def test_ids_are_equal_on_every_file_of_the_standard_library(pair):
    texts = standard_library()
    assert len(texts) > 1000
    counts = verify_hf(pair[1], pair[0], texts)
    assert counts["texts"] == len(texts)
    assert counts["mismatches"] == 0, counts["first"][:200]


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=200), min_size=1, max_size=8))
@settings(max_examples=150, deadline=None)
def test_ids_are_equal_and_text_comes_back_on_random_unicode(both, texts):
    ours, theirs = both
    for text in texts:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs(text)["input_ids"] == [ours.bos_id, *ids]
        # A literal "▁" is how SentencePiece writes a space: it comes back as one. Everything else comes back as it was.
        assert theirs.decode(ids) == ours.decode(ids) == text.replace("▁", " ")
        assert theirs.decode([ours.bos_id, *ids, ours.eos_id], skip_special_tokens=True) == text.replace("▁", " ")


@given(st.text(alphabet=" \n\tab=-_▁<s>/0", max_size=120))
@settings(max_examples=300, deadline=None)
def test_ids_are_equal_on_runs_and_repetitions(both, text):
    ours, theirs = both
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)


def test_special_tokens_are_known(both):
    ours, theirs = both
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)
    assert len(theirs) == ours.vocab_size
    # In a document "<s>" is three characters, not the start of another one.
    assert 1 not in theirs("a <s> b", add_special_tokens=False)["input_ids"]


def test_every_way_to_load_gives_the_same(pair, tmp_path):
    """Beside a model's config.json, as users have it: AutoTokenizer, PreTrainedTokenizerFast, and saved again."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    ours = Tokenizer.load(pair[0])
    directory = tmp_path / "model"
    shutil.copytree(pair[1], directory)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": ours.vocab_size}
    (directory / "config.json").write_text(json.dumps(config))
    AutoTokenizer.from_pretrained(directory).save_pretrained(tmp_path / "again")
    assert verify_hf(directory, pair[0], check_texts())["mismatches"] == 0
    loaded = [PreTrainedTokenizerFast.from_pretrained(directory), AutoTokenizer.from_pretrained(tmp_path / "again")]
    for tokenizer in loaded:
        for text in itertools.islice(check_texts(), 300):
            assert tokenizer.encode(text) == [1, *ours.encode(text)]
    assert AutoTokenizer.from_pretrained(directory, add_bos_token=False).encode("a") == ours.encode("a")


def test_vllm_gives_the_same(pair, tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed (the extras cpu or gpu)")
    directory = tmp_path / "model"
    shutil.copytree(pair[1], directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    program = (
        "import json, sys\n"
        "from vllm.tokenizers import get_tokenizer\n"
        "tokenizer = get_tokenizer(sys.argv[1])\n"
        "texts = json.loads(sys.stdin.read())\n"
        "print(json.dumps([tokenizer.encode(text) for text in texts]))"
    )
    texts = list(check_texts())[:700]
    done = subprocess.run(
        [sys.executable, "-c", program, directory], input=json.dumps(texts), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ours = Tokenizer.load(pair[0])
    assert json.loads(done.stdout.splitlines()[-1]) == [[1, *ours.encode(text)] for text in texts]


@pytest.mark.parametrize("text", [" " * 300_000, "=" * 300_000, "a" * 300_000, "中文" * 100_000, "x = 1\n" * 50_000])
def test_long_texts_are_equal(both, text):
    """Without a pre-tokenizer the whole text is one word to Hugging Face; it must stay usable at that."""
    ours, theirs = both
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)


def model_of(scores: dict[str, float], like: Path, target: Path) -> Path:
    """A SentencePiece BPE with these pieces, and their characters, after the bytes of the model `like`."""
    proto = parse(like.read_bytes())
    del proto.pieces[259:]
    characters = sorted({c for piece in scores for c in piece} | {"▁"})
    for piece, score in [*scores.items(), *((c, -1000.0) for c in characters if c not in scores)]:
        proto.pieces.add(piece=piece, score=score, type=1)
    proto.normalizer_spec.add_dummy_prefix = False
    target.write_bytes(proto.SerializeToString())
    return target


def test_an_order_is_proven_for_real_tokenizers(pair):
    pieces, _ = read_pieces(pair[0])
    assert unproven(pieces, merges(pieces)) is None


def test_what_no_order_can_express_is_refused(tokenizer_model, tmp_path):
    """Two pieces with one score: SentencePiece takes the leftmost, whichever it is; a rank cannot."""
    scores = {"ac": -1.0, "cac": -2.0, "ccac": -3.0, "cacb": -3.0}
    path = model_of(scores, tokenizer_model, tmp_path / "tie.model")
    ours = Tokenizer.load(path)
    names = [piece for piece, _, _ in read_pieces(path)[0]]
    assert [names[i] for i in ours.encode("ccacb")] == ["ccac", "b"]
    assert [names[i] for i in ours.encode("cacb")] == ["cacb"]
    with pytest.raises(UserError, match="no order of merges is known"):
        export_hf(path, tmp_path / "hf")
    assert not [p for p in tmp_path.iterdir() if p != path]


def test_an_overlap_in_the_wrong_order_is_found():
    """aba = ab+a = a+ba, and "abaaba"... : where a|ba|... and ab|a|ba meet, the leftmost must have the lower rank."""
    pieces = [("ab", -1.0, 1), ("ba", -2.0, 1), ("aba", -3.0, 1), ("a", -9.0, 1), ("b", -9.0, 1)]
    order = merges(pieces)
    assert order == [("a", "b"), ("b", "a"), ("ab", "a"), ("a", "ba")]
    assert unproven(pieces, order) is None
    # ab|a|ba cannot come about ("abaab" without a "ba" is ab|a|ab) unless "ba" is joined before "ab".
    pieces[0], pieces[1] = ("ab", -2.0, 1), ("ba", -1.0, 1)
    assert unproven(pieces, merges(pieces)) is None


def test_proofs_hold_on_random_vocabularies(tokenizer_model, tmp_path):
    """Vocabularies far worse than real ones; where the order is proven, every short text must be equal."""
    from tokenizers import Tokenizer as Backend

    texts = ["".join(t) for n in range(1, 11) for t in itertools.product("ab", repeat=n)]
    proven = 0
    for seed in range(40):
        generator = random.Random(seed)
        known = {"a", "b"}
        for _ in range(generator.randint(5, 60)):
            piece = generator.choice(sorted(known)) + generator.choice(sorted(known))
            if len(piece) <= 8:
                known.add(piece)
        pieces = sorted(known - {"a", "b"})
        generator.shuffle(pieces)
        path = model_of({p: -float(i) for i, p in enumerate(pieces)}, tokenizer_model, tmp_path / "random.model")
        table, _ = read_pieces(path)
        if unproven(table, merges(table)) is not None:
            continue
        proven += 1
        theirs = Backend.from_str(json.dumps(tokenizer_json(path)))
        expected = Tokenizer.load(path).encode_batch(texts, 2)
        got = [e.ids for e in theirs.encode_batch(texts, add_special_tokens=False)]
        assert [t for t, x, y in zip(texts, expected, got, strict=True) if x != y] == []
    assert proven >= 20


def test_longer_runs_of_spaces_come_first():
    run = "▁"
    pieces = [
        (run * 2, -1e9, 1),
        (run * 4, -1e9, 1),
        ("▁t", -1.0, 1),
        (run * 3, -1e9, 1),
        (run, -1e9, 1),
        ("t", -5.0, 1),
    ]
    assert merges(pieces) == [
        ("▁", "t"),
        (run * 3, run),
        (run * 2, run * 2),
        (run, run * 3),
        (run * 2, run),
        (run, run * 2),
        (run, run),
    ]


def test_export_command(tokenizer_model, tmp_path):
    done = tinyllama("tokenizer", "export", tokenizer_model, "--output", tmp_path / "hf", "--json")
    assert json.loads(done.stdout)["vocab_size"] == 600
    assert {p.name for p in (tmp_path / "hf").iterdir()} >= {
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
    }


def test_models_of_another_kind_are_refused(corpus, tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus / "prose.jsonl"), model_prefix=str(tmp_path / "unigram"), vocab_size=300,
        model_type="unigram", minloglevel=2,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"as unigram, normalized by nmt_nfkc.*gives other ids"):
        export_hf(tmp_path / "unigram.model", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_export_into_a_directory_keeps_its_other_files(tokenizer_model, tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("{}")
    (target / "tokenizer.json").write_text("stale")
    export_hf(tokenizer_model, target)
    assert (target / "config.json").read_text() == "{}"
    assert json.loads((target / "tokenizer.json").read_text())["model"]["type"] == "BPE"
    assert (target / "tokenizer.model").read_bytes() == tokenizer_model.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        export_hf(tokenizer_model, tmp_path / "file")
