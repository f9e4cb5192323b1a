"""A tokenizer.model as a Hugging Face tokenizer directory with exactly SentencePiece's ids, proven before it is written.

SentencePiece joins, again and again, the neighbours whose joined piece has the highest score, the leftmost first among
equals. Hugging Face's BPE joins the pair of lowest rank, the leftmost first within one pair. So every split of every
piece becomes a merge, ranked by the piece's score. Ranks cannot say "leftmost" of two different pairs with one score;
`merges` orders these, `unproven` looks for a text that could tell the difference (then nothing is written), and a
check corpus is encoded both ways, because libraries change.

What users should know: text such as `<s>` inside a document is text, as it is for SentencePiece
(`split_special_tokens`; the bare `tokenizers` library ignores this setting). bos comes first with
`add_special_tokens=True`, by the post-processor in tokenizer.json. Load with AutoTokenizer or PreTrainedTokenizerFast:
transformers' LlamaTokenizer rebuilds the normalizer in its own way. Bytes that are no UTF-8 decode to other
replacement characters than SentencePiece's.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from tinyllama.errors import MissingExtraError, UserError
from tinyllama.tokenizer.hf_json import Pair, Pieces, build, read_model, read_pieces, special_names
from tinyllama.tokenizer.sentencepiece_model import NORMAL, SPACE, Tokenizer

WRITTEN = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")


def merges(pieces: list[tuple[str, float, int]]) -> list[Pair]:
    """Every split of every piece into two pieces, best score first.

    Among equals: the longer piece first (a run of spaces then grows to its full length before the next one starts), and
    of one piece's splits the one with the longer left part, which starts further left where two of them overlap.
    """
    score = {piece: value for piece, value, kind in pieces if kind == NORMAL}
    found = []
    for piece, value in score.items():
        for cut in range(len(piece) - 1, 0, -1):
            left, right = piece[:cut], piece[cut:]
            if left in score and right in score:
                found.append((-value, -len(piece), piece, -cut, (left, right)))
    return [pair for *_, pair in sorted(found)]


def unproven(pieces: list[tuple[str, float, int]], order: list[Pair]) -> str | None:
    """None if no text is found on which BPE with the merges `order` could part from SentencePiece; else such a text.

    An argument, not a formal proof: `export` encodes its check corpus both ways as well.

    Pieces with one score. Allowed are only runs of spaces of every length from 2 to some m (Llama 2: one score, -1e9,
    for all up to 16), below all else, and no other piece with two spaces. All else is then joined first; in what is
    left of a run, leftmost-first and longest-first both grow the leftmost block to m before the next one starts.

    Other pieces have a score of their own, so the two algorithms can only part where one piece P is joined from two
    different splits at two places. What follows at once from a join are pieces of higher score made from that P; if
    the symbols that two joins and their consequences take are apart, the order does not matter. They meet only if the
    places overlap (x|y|z with P = xy = yz), or one's consequence takes a part of the other place, or takes the other
    P, or both want one symbol between them. `_critical_texts` lists the text of every such case. Merges inside a
    stretch of text do not depend on what is outside until one crosses its ends, so a case exists in some text only if
    it comes about in that short text alone, which `_parts` tries out, with every choice that either could make.
    """
    score = {piece: value for piece, value, kind in pieces if kind == NORMAL}
    splits: dict[str, list[Pair]] = defaultdict(list)
    for left, right in order:
        splits[left + right].append((left, right))
    holders = Counter(score[piece] for piece in splits)
    tied = sorted((piece for piece in splits if holders[score[piece]] > 1), key=len)
    if tied:
        lowest = min(score[piece] for piece in splits)
        for number, piece in enumerate(tied):
            if score[piece] > lowest or piece != SPACE * (number + 2):
                return piece
        for piece in splits.keys() - tied:
            if SPACE * 2 in piece:
                return piece
    rank = {pair: number for number, pair in enumerate(order)}
    for piece in tied:
        if len(piece) > 2 and rank[piece[1:], SPACE] > rank[SPACE, SPACE]:
            return piece
        del splits[piece]
    return next((text for text in sorted(_critical_texts(splits, score)) if _parts(text, score, rank)), None)


def _critical_texts(splits: dict[str, list[Pair]], score: dict[str, float]) -> set[str]:
    """Every text that a conflict between two splits of one piece needs (see `unproven`)."""
    texts: set[str] = set()
    for ways in splits.values():
        texts.update(x + y + z for x, y in ways for left, z in ways if y == left and x != left)
    # (P, symbol): the pieces in which P, or what is made from it, takes the symbol on its right or on its left.
    takes_right: dict[Pair, set[str]] = defaultdict(set)
    takes_left: dict[Pair, set[str]] = defaultdict(set)
    for whole in splits:
        for start in range(len(whole) - 1):
            for stop in range(start + 2, len(whole) + 1):
                piece = whole[start:stop]
                ways = splits.get(piece, [])
                if len(ways) < 2 or score[piece] >= score[whole]:
                    continue
                before, after = whole[:start], whole[stop:]
                if piece in after:
                    texts.add(whole)
                texts.update(left + whole for left, right in ways if before.startswith(right))
                texts.update(whole + right for left, right in ways if after.endswith(left))
                for cut in range(len(after)):
                    takes_right[piece, after[cut:]].add(whole)
                for cut in range(1, len(before) + 1):
                    takes_left[piece, before[:cut]].add(whole)
    for (piece, symbol), wholes in takes_right.items():
        if symbol in score:
            for other in takes_left.get((piece, symbol), ()):
                texts.update(whole + other[len(symbol) :] for whole in wholes)
    return texts


def _parts(text: str, score: dict[str, float], rank: dict[Pair, int]) -> bool:
    """Whether the order of equals can matter in a text: tries every order that the two algorithms could take."""
    todo = [tuple(text)]
    seen = set(todo)
    while todo:
        state = todo.pop()
        pairs = list(pairwise(state))
        values = [score.get(left + right) for left, right in pairs]
        best = max((value for value in values if value is not None), default=None)
        if best is None:
            continue
        places = [place for place, value in enumerate(values) if value == best]
        for number, first in enumerate(places):
            for second in places[number + 1 :]:
                overlap_in_order = second == first + 1 and rank[pairs[first]] < rank[pairs[second]]
                if pairs[first] != pairs[second] and not overlap_in_order:
                    return True
        # Both take the leftmost place of a pair, and neither takes a place whose left neighbour overlaps it.
        for place in {pairs[place]: place for place in reversed(places)}.values():
            if place - 1 not in places:
                joined = (*state[:place], "".join(pairs[place]), *state[place + 2 :])
                if joined not in seen:
                    seen.add(joined)
                    todo.append(joined)
    return False


def tokenizer_json(path: Path) -> dict[str, Any]:
    """The content of `tokenizer.json`: normalizer, model, post-processor with bos, decoder.

    UserError if the model is of another kind, or no order of merges is known to give its ids.
    """

    def order_of(pieces: Pieces) -> list[Pair]:
        order = merges(pieces)
        if (doubt := unproven(pieces, order)) is not None:
            raise UserError(
                f"{path}: no order of merges is known to give SentencePiece's ids on texts such as {doubt!r}",
                fix="nothing was written; report this tokenizer",
            )
        return order

    return build(path, order_of)


def short_texts(seed: int = 0) -> Iterator[str]:
    """Hostile texts: spaces, specials as text, what normalizers change, random Unicode, runs."""
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
        *(
            "\r\n",
            "a\r\nb",
            "\u1100\u1161\u11a8",
            "e\u0301\u0323",
            "\u212b \ufb01 \u00bd \uff11\uff12",
            "\u3000a\u00a0\u2003b ",
        ),
        *(" ▁", "▁ ", "a ▁ ", "  a  b  ", "\u200ba\u200b", "\ufeffa", "\u4e16\u754c" * 40),
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


def piece_texts(names: Sequence[str], seed: int = 0) -> Iterator[str]:
    """Every piece, and random rows of pieces and spaces: what meets in no ordinary text."""
    yield from names
    generator = random.Random(seed)
    for _ in range(500):
        row = (generator.choice((" ", "  ", "\n", *names[:2], "") if generator.random() < 0.2 else names)
               for _ in range(generator.randint(1, 30)))  # fmt: skip
        yield "".join(row)


def check_texts(seed: int = 0) -> Iterator[str]:
    """Texts on which an export is proven: hostile ones, and CPython's topics and sources."""
    yield from short_texts(seed)
    from pydoc_data.topics import topics

    yield from topics.values()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[::4]:
        try:
            yield path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue


def verify_hf(directory: str | os.PathLike[str], model: str | os.PathLike[str], texts: Iterable[str]) -> dict[str, Any]:
    """Encode `texts` with both; returns {texts, tokens, mismatches, first}: counts, and the first text that differs.

    Checks the ids with special tokens, which must be SentencePiece's with bos in front, and of texts up to 10,000
    characters also those without, and the text that they give again.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingExtraError("transformers", "model") from None
    ours, theirs = Tokenizer.load(model), AutoTokenizer.from_pretrained(directory)
    counts: dict[str, Any] = {"texts": 0, "tokens": 0, "mismatches": 0, "first": None}
    threads = os.cpu_count() or 1
    pending: list[str] = []

    def compare() -> None:
        expected = ours.encode_batch(pending, threads)
        full = theirs(pending)["input_ids"]
        short = [text for text in pending if len(text) <= 10_000]
        plain = dict(zip(short, theirs(short, add_special_tokens=False)["input_ids"], strict=True)) if short else {}
        for text, want, got in zip(pending, expected, full, strict=True):
            counts["texts"] += 1
            counts["tokens"] += len(want)
            # What a model without bytes does not know is written in two ways.
            again = len(text) > 10_000 or ours.unk_id in want or theirs.decode(want) == ours.decode(want)
            if got != [ours.bos_id, *want] or plain.get(text, want) != want or not again:
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


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {target} ({error.strerror or error})", fix="give a writable --output") from None


def why_not(model: str | os.PathLike[str]) -> str | None:
    """Why a tokenizer could not be exported, as far as can be told in seconds; None if nothing is found.

    Of Llama's kind the settings are looked at; of any other, hostile texts are encoded both ways where the tokenizers
    library is installed. Export does more, and has the last word.
    """
    loaded = Tokenizer.load(model)
    try:
        if loaded.is_llama_like:
            read_pieces(loaded.path)
            return None
        content = tokenizer_json(loaded.path)
    except UserError as error:
        return error.what.removeprefix(f"{loaded.path} ").removeprefix(f"{loaded.path}: ")
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError:
        return None
    theirs = Backend.from_str(json.dumps(content))
    theirs.encode_special_tokens = True  # "<s>" in a document is text
    texts = [*short_texts(), *piece_texts([piece for piece, _ in loaded.pieces()])]
    found = theirs.encode_batch(texts, add_special_tokens=False)
    wrong = [t for t, ids, got in zip(texts, loaded.encode_batch(texts, 1), found, strict=True) if got.ids != ids]
    return _parting(loaded, min(wrong, key=len), len(wrong), len(texts)) if wrong else None


def _parting(loaded: Tokenizer, first: str, wrong: int, texts: int) -> str:
    """The reason that a counterpart is not good enough."""
    return (
        f"as {loaded.kind} its counterpart in Hugging Face's library gives other ids than SentencePiece on {wrong:,} of "
        f"{texts:,} texts, such as {first[:40]!r}"
    )


def refuse_unexportable(model: str | os.PathLike[str], flag: str) -> None:
    """UserError for a tokenizer that `why_not` finds fault with: asked before a model is trained with it."""
    if reason := why_not(model):
        raise UserError(
            f"tokenizer {model}: a model trained with it could be neither exported nor evaluated ({reason})",
            fix=f"train another: tinyllama tokenizer train; or {flag} to train all the same",
        )


def _write(directory: Path, model: Path, content: dict[str, Any], special: dict[str, str]) -> None:
    (directory / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    settings = {
        # Not LlamaTokenizer, which transformers rebuilds from the vocabulary with a normalizer of its own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        # transformers 5 follows tokenizer.json's post-processor and does not read these two; others do.
        "add_bos_token": True,
        "add_eos_token": False,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (directory / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    shutil.copyfile(model, directory / "tokenizer.model")


def export_hf(model: str | os.PathLike[str], output: str | os.PathLike[str]) -> dict[str, Any]:
    """Write the Hugging Face tokenizer directory `output` from a tokenizer.model, after proving its ids.

    Returns {sha256, vocab_size, checked: {texts, tokens}}. An existing directory keeps its other files. UserError, and
    nothing written, if the model is of another kind, its order of merges is unproven, or an id differs.
    """
    loaded = Tokenizer.load(model)
    if not loaded.is_llama_like and (reason := why_not(model)):  # some seconds instead of a minute
        raise UserError(f"{loaded.path} cannot be exported: {reason}", fix="train one with Llama's settings")
    content = tokenizer_json(loaded.path)
    target = Path(output)
    partial = target.with_name(f"{target.name}.tokenizer-partial")
    try:
        with _writing(target):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            pieces, proto = read_model(loaded.path)
            _write(partial, loaded.path, content, special_names(pieces, proto))
        counts = verify_hf(partial, loaded.path, chain(check_texts(), piece_texts([piece for piece, *_ in pieces])))
        if counts["mismatches"]:
            reason = _parting(loaded, counts["first"], counts["mismatches"], counts["texts"])
            raise UserError(f"{loaded.path}: {reason}", fix="nothing was written; train one with Llama's settings")
        with _writing(target):
            if target.exists():
                for path in sorted(partial.iterdir()):
                    os.replace(path, target / path.name)
            else:
                os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {
        "sha256": loaded.sha256,
        "vocab_size": loaded.vocab_size,
        "checked": {k: counts[k] for k in ("texts", "tokens")},
    }
