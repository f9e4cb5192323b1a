"""A tokenizer.model as a Hugging Face tokenizer directory, with exactly SentencePiece's ids, proven before it is written.

SentencePiece joins, again and again, the neighbours whose joined piece has the highest score, the leftmost first among
equals. Hugging Face's BPE joins the pair of lowest rank, the leftmost first within one pair. So every split of every
piece becomes a merge, ranked by the piece's score. Two kinds of equals need an order of their own:

- Runs of spaces all have one score (-1e9 in Llama 2's model). Leftmost-first then means that the leftmost run grows
  until nothing longer exists before the next one starts; ranking longer results first does just that.
- Several splits of one piece: the one with the longer left part first, which starts further left where two overlap.

Text such as `<s>` inside a document is text, as it is for SentencePiece (`split_special_tokens`). The exporter encodes a
check corpus both ways and writes nothing if one id differs.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tinyllama.errors import UserError
from tinyllama.tokenizer.sentencepiece_model import Tokenizer

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # SentencePiece's piece types
SPACE = "▁"


def read_pieces(path: Path) -> tuple[list[tuple[str, float, int]], Any]:
    """(piece, score, type) for every id, and the normalizer spec; UserError for models that are not Llama's kind."""
    from sentencepiece import sentencepiece_model_pb2

    proto = getattr(sentencepiece_model_pb2, "ModelProto")()  # noqa: B009 - made when imported
    proto.ParseFromString(path.read_bytes())
    spec, rules = proto.trainer_spec, proto.normalizer_spec
    if spec.model_type != 2:
        raise UserError(f"{path} is not a BPE model", fix="only SentencePiece BPE (Llama's kind) can be exported")
    if rules.name != "identity" or rules.remove_extra_whitespaces or spec.treat_whitespace_as_suffix:
        raise UserError(f"{path} normalizes text ({rules.name})", fix="only identity normalization can be exported")
    pieces = [(p.piece, p.score, p.type) for p in proto.pieces]
    kinds = {kind for _, _, kind in pieces}
    if not kinds <= {NORMAL, UNKNOWN, CONTROL, BYTE}:
        raise UserError(f"{path} has user-defined or unused pieces", fix="train it without them")
    if sum(kind == BYTE for _, _, kind in pieces) != 256:
        raise UserError(f"{path} has no byte fallback", fix="train it with byte fallback")
    known = {piece for piece, _, kind in pieces if kind == NORMAL}
    missing = {c for piece in known for c in piece} - known
    if missing:
        raise UserError(f"{path}: characters {sorted(missing)[:5]} are in pieces but not pieces", fix="train it again")
    return pieces, rules


def merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Every split of every piece into two pieces, in the order that reproduces SentencePiece (see the module)."""
    score = {piece: value for piece, value, kind in pieces if kind == NORMAL}
    found = []
    for piece, value in score.items():
        for cut in range(len(piece) - 1, 0, -1):
            left, right = piece[:cut], piece[cut:]
            if left in score and right in score:
                found.append((-value, -len(piece), piece, -cut, (left, right)))
    return [pair for *_, pair in sorted(found)]


def tokenizer_json(path: Path) -> dict[str, Any]:
    """The content of `tokenizer.json`: normalizer, BPE with byte fallback, post-processor with bos, decoder."""
    pieces, rules = read_pieces(path)
    names = [piece for piece, _, _ in pieces]
    unk, bos, eos = (_special(pieces, name) for name in ("<unk>", "<s>", "</s>"))
    special = [
        {"id": i, "content": names[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for i in (unk, bos, eos)
    ]  # fmt: skip
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if rules.add_dummy_prefix:
        steps.insert(0, {"type": "Prepend", "prepend": SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    bos_token = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos_token, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                bos_token,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<s>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [bos], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": [list(pair) for pair in merges(pieces)],
        },
    }


def _special(pieces: list[tuple[str, float, int]], name: str) -> int:
    for index, (piece, _, kind) in enumerate(pieces):
        if piece == name and kind in (UNKNOWN, CONTROL):
            return index
    raise UserError(f"the tokenizer has no {name} piece", fix="train it with Llama's settings")


def check_texts(seed: int = 0) -> Iterator[str]:
    """Texts on which an export is proven: spaces, specials as text, random Unicode, CPython's topics and sources."""
    yield from (
        "",
        " ",
        "  ",
        "a",
        " a",
        "a ",
        "\n",
        "\r\n",
        "\t\t x",
        "\x00",
        "a\x00b",
        "▁",
        " ▁ a▁▁b",
        "<s>",
        "</s> <unk>",
    )
    yield from ("<0x0A>", "👩‍👩‍👧‍👦 e\u0301 \u202e\u200b", "1234567890 3.14", "=" * 100, "ab" * 50, "-" * 33 + "=" * 31)
    for count in range(1, 70):
        yield " " * count
        yield "x" + " " * count + "y\n" + " " * count
    generator = random.Random(seed)
    alphabets = ((0x20, 0x7E), (0, 0x2FF), (0x300, 0x1FFF), (0x2000, 0x2BFF), (0x3000, 0xD7FF), (0xE000, 0x1FAFF))
    for _ in range(400):
        low, high = generator.choice(alphabets)
        text = "".join(chr(generator.randint(low, high)) for _ in range(generator.randint(1, 60)))
        yield text.replace("\x00", " ") + " " * generator.randint(0, 3) + text[:5]
    for _ in range(200):
        yield "".join(generator.choice("aab \n\t  =-_.()e▁") for _ in range(generator.randint(1, 80)))
    from pydoc_data.topics import topics

    yield from topics.values()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[::4]:
        try:
            yield path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue


def verify_hf(directory: str | os.PathLike[str], model: str | os.PathLike[str], texts: Iterable[str]) -> dict[str, Any]:
    """Encode `texts` with both; returns counts and the first text that differs (None if none does).

    Checks the ids without special tokens, and that special tokens add bos in front and nothing else.
    """
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.load(model), AutoTokenizer.from_pretrained(directory)
    counts: dict[str, Any] = {"texts": 0, "tokens": 0, "mismatches": 0, "first": None}
    threads = os.cpu_count() or 1
    pending: list[str] = []

    def compare() -> None:
        expected = ours.encode_batch(pending, threads)
        plain = theirs(pending, add_special_tokens=False)["input_ids"]
        full = theirs(pending)["input_ids"]
        for text, want, got, with_bos in zip(pending, expected, plain, full, strict=True):
            counts["texts"] += 1
            counts["tokens"] += len(want)
            if want != got or with_bos != [ours.bos_id, *want]:
                counts["mismatches"] += 1
                counts["first"] = counts["first"] if counts["first"] is not None else text
        pending.clear()

    for text in texts:
        pending.append(text)
        if len(pending) == 64:
            compare()
    if pending:
        compare()
    return counts


def export_hf(model: str | os.PathLike[str], output: str | os.PathLike[str]) -> dict[str, Any]:
    """Write the Hugging Face tokenizer directory `output` from a tokenizer.model, after proving its ids.

    Returns what was checked. UserError, and nothing written, if the model is of another kind or an id differs.
    """
    loaded = Tokenizer.load(model)
    target = Path(output)
    partial = target.with_name(f"{target.name}.tokenizer-partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        content = tokenizer_json(loaded.path)
        (partial / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": True,
            "add_eos_token": False,
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1_000_000_000,
        }
        (partial / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (partial / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
        shutil.copyfile(loaded.path, partial / "tokenizer.model")
        counts = verify_hf(partial, loaded.path, check_texts())
        if counts["mismatches"]:
            raise UserError(
                f"{counts['mismatches']} of {counts['texts']} texts get other ids than SentencePiece's, first "
                f"{counts['first'][:40]!r}",
                fix="nothing was written; report this tokenizer",
            )
        target.mkdir(parents=True, exist_ok=True)
        for path in partial.iterdir():
            os.replace(path, target / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {
        "sha256": loaded.sha256,
        "vocab_size": loaded.vocab_size,
        "checked": {k: counts[k] for k in ("texts", "tokens")},
    }
