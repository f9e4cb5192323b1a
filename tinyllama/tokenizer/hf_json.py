"""A tokenizer.model as the `tokenizer.json` that Hugging Face's library reads: what can be written down, and what cannot.

What SentencePiece does is told by three things: how it normalizes (a map of characters, spaces removed or not, a space put
before), its model (BPE or unigram, with bytes or without), and its special pieces. Each has a counterpart here. That the
ids are the same is not said here, but proven by `export`: a map of characters is applied to other stretches of text
there, and unigram scores are added up in another precision.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyllama.errors import UserError
from tinyllama.tokenizer.sentencepiece_model import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED, parse

UNIGRAM, BPE = 1, 2  # SentencePiece's model types
NEVER = 1000.0  # below the lowest score: for pieces that no text may become
Pieces = list[tuple[str, float, int]]
Pair = tuple[str, str]


def read_pieces(path: Path) -> tuple[Pieces, Any]:
    """(piece, score, type) for every id, and the normalizer spec; UserError for models that cannot be written down."""
    pieces, proto = read_model(path)
    return pieces, proto.normalizer_spec


def read_model(path: Path) -> tuple[Pieces, Any]:
    """(piece, score, type) for every id, and the whole model; UserError for models that cannot be written down."""
    proto = parse(path.read_bytes())
    pieces = [(p.piece, p.score, p.type) for p in proto.pieces]
    if reason := _problem(pieces, proto):
        raise UserError(
            f"{path} cannot be written as a Hugging Face tokenizer: {reason}",
            fix="train one with Llama's settings: tinyllama tokenizer train",
        )
    return pieces, proto


def _problem(pieces: Pieces, proto: Any) -> str | None:
    """Why a model has no counterpart; None if it has one."""
    spec, rules = proto.trainer_spec, proto.normalizer_spec
    if spec.model_type not in (UNIGRAM, BPE):
        return "it is neither a BPE nor a unigram model"
    if spec.treat_whitespace_as_suffix or not rules.escape_whitespaces:
        return "it puts spaces behind words, or keeps them as spaces"
    kinds = {kind for _, _, kind in pieces}
    if USER_DEFINED in kinds:
        # As added tokens they would be taken out before the text is normalized; as words of their own, "<0x41>" between
        # two of them would become the byte.
        own = [piece for piece, _, kind in pieces if kind == USER_DEFINED]
        return f"its user-defined pieces, such as {own[0]!r}, cannot be taken out of a text there as SentencePiece does"
    if not kinds <= {NORMAL, UNKNOWN, CONTROL, BYTE}:
        return "it has unused pieces"
    if len({piece for piece, _, _ in pieces}) < len(pieces):
        return "two of its pieces are the same text"
    num_bytes = sum(kind == BYTE for _, _, kind in pieces)
    if num_bytes != (256 if spec.byte_fallback else 0):
        return f"it has {num_bytes} byte pieces"
    known = {piece for piece, _, kind in pieces if kind == NORMAL}
    if spec.model_type == BPE and (missing := {c for piece in known for c in piece} - known):
        return f"characters {sorted(missing)[:5]} are in its pieces and are no pieces themselves"
    if spec.model_type == UNIGRAM:
        hidden = {c for piece, _, kind in pieces if kind in (CONTROL, UNKNOWN, BYTE) for c in piece}
        if missing := hidden - known:
            # Hugging Face would find "<s>" in a text rather than take its characters for unknown ones.
            return f"the characters {sorted(missing)[:5]} of its special pieces are no pieces themselves"
    return None


def special_names(pieces: Pieces, proto: Any) -> dict[str, str]:
    """unk_token, bos_token and eos_token by name."""
    spec = proto.trainer_spec
    found = {}
    wanted = (
        ("unk_token", spec.unk_id, "<unk>"),
        ("bos_token", spec.bos_id, "<s>"),
        ("eos_token", spec.eos_id, "</s>"),
    )
    for token, index, default in wanted:
        named = next((i for i, (piece, _, kind) in enumerate(pieces) if piece == default and kind != NORMAL), index)
        if not 0 <= named < len(pieces) or pieces[named][2] not in (UNKNOWN, CONTROL):
            raise UserError(f"the tokenizer has no {default} piece", fix="train it with Llama's settings")
        found[token] = pieces[named][0]
    return found


def _normalizers(rules: Any) -> list[dict[str, Any]]:
    """The steps of SentencePiece's normalizer, in its order. \\A and \\z are the ends of a text, ^ and $ those of lines."""
    steps: list[dict[str, Any]] = []

    def replace(kind: str, pattern: str, content: str) -> None:
        steps.append({"type": "Replace", "pattern": {kind: pattern}, "content": content})

    if rules.precompiled_charsmap:
        charsmap = base64.b64encode(rules.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if rules.remove_extra_whitespaces:
        replace("Regex", r"\A +", "")
        replace("Regex", " {2,}", " ")
    if rules.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    replace("String", " ", SPACE)
    if rules.remove_extra_whitespaces:
        replace("Regex", rf"{SPACE}+\z", "")
    return steps


def _decoders(proto: Any) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    if proto.trainer_spec.byte_fallback:
        steps.append({"type": "ByteFallback"})
    steps.append({"type": "Fuse"})
    rules = proto.normalizer_spec
    if rules.add_dummy_prefix or rules.remove_extra_whitespaces:
        # Where spaces at the ends are removed, all of them are when it is decoded, too.
        start = 1 << 20 if rules.remove_extra_whitespaces else 1
        steps.append({"type": "Strip", "content": " ", "start": start, "stop": 0})
    return steps


def _bpe(pieces: Pieces, proto: Any, order: list[Pair], unk: str) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": bool(proto.trainer_spec.byte_fallback),
        "ignore_merges": False,
        "vocab": {piece: i for i, (piece, _, _) in enumerate(pieces)},
        "merges": [list(pair) for pair in order],
    }


def _unigram(pieces: Pieces, proto: Any, unk: str) -> dict[str, Any]:
    lowest = min(score for _, score, kind in pieces if kind == NORMAL)
    never = {UNKNOWN: lowest - NEVER, CONTROL: lowest - NEVER, BYTE: lowest - NEVER}
    return {
        "type": "Unigram",
        "unk_id": next(i for i, (piece, _, _) in enumerate(pieces) if piece == unk),
        "vocab": [[piece, never.get(kind, score)] for piece, score, kind in pieces],
        "byte_fallback": bool(proto.trainer_spec.byte_fallback),
    }


def build(path: Path, order_of: Callable[[Pieces], list[Pair]]) -> dict[str, Any]:
    """The content of tokenizer.json. order_of: gives the merges of a BPE model's pieces. UserError if there is none."""
    pieces, proto = read_model(path)
    names = special_names(pieces, proto)
    ids = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    unk, bos = names["unk_token"], names["bos_token"]
    special = [
        {"id": i, "content": piece, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for i, (piece, _, kind) in enumerate(pieces) if kind in (UNKNOWN, CONTROL)
    ]  # fmt: skip
    bos_token = {"SpecialToken": {"id": bos, "type_id": 0}}
    is_bpe = proto.trainer_spec.model_type == BPE
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(proto.normalizer_spec)},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos_token, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                bos_token,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": bos, "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [ids[bos]], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": _decoders(proto)},
        "model": _bpe(pieces, proto, order_of(pieces), unk) if is_bpe else _unigram(pieces, proto, unk),
    }
