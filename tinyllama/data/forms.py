"""The forms of input files: by their names, and by their first bytes where these say something else.

A name decides how a file is read. Its first bytes can only object: gzip under the name of JSON lines, a page of HTML that a
server sent instead of the file, the pointer that git-lfs leaves in its place.
"""

from __future__ import annotations

import re

LINE_SUFFIXES = (
    *(".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst"),
    *(".json.gz", ".json.zst"),
)
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
SUFFIXES = (*LINE_SUFFIXES, *TEXT_SUFFIXES, ".parquet")
# Data in forms that are not read: as text they would be nonsense.
FOREIGN_SUFFIXES = (
    *(".json", ".csv", ".tsv", ".bz2", ".xz", ".lz4", ".gz", ".zst", ".zip", ".tar", ".tgz", ".7z"),
    *(".arrow", ".feather", ".avro", ".orc", ".npy", ".bin", ".safetensors", ".pdf"),
)
FIX = "give files or folders of .jsonl, .parquet or text"
HEAD_BYTES = 1 << 12
# Names of files about the data. Words that may also begin a document's name stand alone: CHANGES.md, changes-of-1999.txt.
ABOUT = re.compile(
    r"((readme|licen[cs]e|copying|requirements|checksums?|md5sums?|sha(1|256|512)sums?)([-_.].*)?"
    r"|(notice|citation|changelog|changes|contributing|authors|code_of_conduct|security|data_?(set)?_?card|datasheet)"
    r"(\.[a-z]{1,4})?)",
    re.IGNORECASE,
)
HIDDEN_FOLDERS = ("__pycache__", "__MACOSX")  # besides those that begin with a dot
# Beside records, these are loaders and descriptions.
ABOUT_RECORDS = (".md", ".rst", ".py")
_MAGIC = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstandard"),
    (b"PAR1", "parquet"),
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"ARROW1", "arrow"),
    (b"%PDF-", "PDF"),
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
    (b"version https://git-lfs", "a git-lfs pointer"),
)
_HTML = re.compile(rb"\s*<(!doctype\s+html|html|head|\?xml|error)\b", re.IGNORECASE)
# An object's first key, or a list of values: `{"use strict"}` and `[[a link]]` are none.
_JSON = re.compile(rb'\s*(\{\s*("([^"\\]|\\.)*"\s*:|\}\s*$|$)|\[\s*(\{\s*["}]|"|\[\s*["\[{\]\d-]|\]\s*$|$))')
NAMES = {"gzip": ".jsonl.gz", "zstandard": ".jsonl.zst", "parquet": ".parquet", "JSON": ".jsonl"}


def kind_of(name: str) -> str | None:
    """ "lines", "parquet" or "text" by a file's name; None if it says nothing, or names a form that is not read."""
    lower = name.lower()
    if lower.endswith(LINE_SUFFIXES):
        return "lines"
    if lower.endswith(".parquet"):
        return "parquet"
    return "text" if lower.endswith(TEXT_SUFFIXES) else None


def is_foreign(name: str) -> bool:
    """Whether the name is of a form that is not read."""
    return kind_of(name) is None and name.lower().endswith(FOREIGN_SUFFIXES)


def seen_in(head: bytes) -> str:
    """What the first bytes of a file look like: a form's name, or "text"."""
    for magic, form in _MAGIC:
        if head.startswith(magic):
            return form
    head = head.removeprefix(b"\xef\xbb\xbf")
    if _HTML.match(head):
        return "HTML"
    if _JSON.match(head):
        return "JSON"
    if head[:64].count(0) > len(head[:64]) // 4:
        return "UTF-16 or binary data"
    return "text"


def contradiction(name: str, head: bytes, expected: str) -> str | None:
    """What is wrong with a file of this name that begins so; None if nothing is.

    expected: "gzip", "zstandard", "parquet", "lines" (also of what has been decompressed) or "text".
    """
    found = seen_in(head)
    if not head or found == expected:
        return None
    if expected == "text":
        # HTML and JSON are texts, too, where a name says so.
        return None if found in ("text", "HTML", "JSON") else f"{name} is not UTF-8 text: it looks like {found}"
    if expected == "lines":
        return None if found in ("text", "JSON") else f"{name} is {found}, not JSON lines"
    if found == "text":
        return None  # its own library says what is wrong
    return f"{name} is {found}, not {expected}"


def remedy(found: str) -> str:
    """The fix for a contradiction."""
    for form, suffix in NAMES.items():
        if f"is {form}," in found:
            return f"if it is whole, give it a name that ends with {suffix}"
    if "git-lfs" in found:
        return "fetch the file itself: git lfs pull"
    if "HTML" in found:
        return "fetch it again: a page came instead of the file"
    return "give .jsonl[.gz|.zst], .parquet or text in UTF-8"
