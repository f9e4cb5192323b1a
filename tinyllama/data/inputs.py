"""Input files: found in folders, on this machine or at any fsspec address (s3://, gs://, hf://, https://).

Decides which files of a folder are documents, and what each file is called. Reading them is the business of
`input_file`, what is in them that of `documents`.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tinyllama.data.addresses import filesystem, identity, is_address, names, parents, shown, with_path, without_secrets
from tinyllama.data.forms import (
    ABOUT,
    ABOUT_RECORDS,
    FIX,
    HIDDEN_FOLDERS,
    SUFFIXES,
    contradiction,
    is_foreign,
    kind_of,
    seen_in,
)
from tinyllama.data.input_file import HashedStream, InputFile
from tinyllama.errors import DataError

# What file systems call the mark of a file's content: S3, GCS, others, Hugging Face, HTTP, zip.
VERSION_MARKS = (
    *("ETag", "LastModified", "etag", "md5Hash", "mtime", "oid"),
    *("blob_id", "xet_hash", "Last-Modified", "Content-MD5", "CRC"),
)
LeftOut = dict[str, list[str]]  # why -> which files and folders


def _version(info: dict[str, Any]) -> str:
    marks = {key: str(info[key]) for key in VERSION_MARKS if key in info}
    return repr(sorted(marks.items()))


def _is_hidden_folder(name: str) -> bool:
    return name.startswith(".") or name in HIDDEN_FOLDERS


def _about(path: str) -> str | None:
    """Why a file below an input is no document; None if it may be one, as every file of records or of Python may."""
    name = path.rpartition("/")[2]
    if name.startswith("."):
        return "hidden"
    is_data = kind_of(name) in ("lines", "parquet") or name.lower().endswith(".py")
    return "about the data" if not is_data and ABOUT.fullmatch(name) else None


def _sift(below: Iterable[str], suffixes: tuple[str, ...], left_out: LeftOut, root: str) -> list[str]:
    """The names below `root` that are documents; the others are added to `left_out` with the reason."""
    kept = []
    for name in below:
        if reason := _about(name):
            left_out[reason].append(f"{root}{name}")
        elif name.lower().endswith(suffixes):
            kept.append(name)
        else:
            left_out["of another form"].append(f"{root}{name}")
    if any(kind_of(name) != "text" for name in kept):
        beside = [name for name in kept if name.lower().endswith(ABOUT_RECORDS)]
        left_out["beside records"] += [f"{root}{name}" for name in beside]
        kept = [name for name in kept if not name.lower().endswith(ABOUT_RECORDS)]
    return kept


def _walk(root: Path, left_out: LeftOut) -> list[str]:
    """Every file below a folder, through links, but for hidden folders. OSError as the system has it."""

    def refuse(error: OSError) -> None:
        raise error  # os.walk would leave out what it may not read

    found, visited = [], set()
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            raise DataError(f"{folder} is reached twice, by a link", fix="remove the link")
        visited.add(real)
        hidden = [name for name in subfolders if _is_hidden_folder(name)]
        left_out["hidden"] += [f"{folder}/{name}/" for name in hidden]
        subfolders[:] = [name for name in subfolders if name not in hidden]
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in files]
    return found


def _find_local(given: str, suffixes: tuple[str, ...], left_out: LeftOut) -> list[InputFile]:
    root = Path(given)
    try:
        if not root.is_dir():
            return [_local_input(root, root.name)] if root.exists() else []
        found: dict[tuple[int, int] | str, InputFile] = {}
        for name in sorted(_sift(_walk(root, left_out), suffixes, left_out, f"{root}/")):
            file = _local_input(root / name, name)
            first = found.setdefault(_same(file), file)
            if first is not file:
                left_out["the same file as another"].append(f"{file.address} (as {first.name})")
        return list(found.values())
    except FileNotFoundError as error:
        raise DataError(
            f"{error.filename} is a link to a file that is not there", fix="fetch it, or remove it"
        ) from None
    except PermissionError as error:
        raise DataError(f"{error.filename} is not readable", fix="grant read permission") from None
    except OSError as error:  # a link to itself, a name that is too long
        raise DataError(f"{error.filename} cannot be looked at ({error.strerror})", fix="remove it") from None


def _same(file: InputFile) -> tuple[int, int] | str:
    """Equal for two names of one file: by links of both kinds, or two spellings of an address."""
    if not file.is_local:
        return identity(file.opens or file.address)
    status = os.stat(file.address)
    return (status.st_dev, status.st_ino) if status.st_nlink > 1 else os.path.realpath(file.address)


def _local_input(path: Path, name: str) -> InputFile:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise DataError(f"the name of {str(path)!a} is not UTF-8", fix="rename it") from None
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} is neither a file nor a folder", fix="write what it gives into a file first")
    return InputFile(str(path), name, status.st_size, str(status.st_mtime_ns))


def _remote_input(given: str, address: str, info: dict[str, Any], name: str) -> InputFile:
    if info.get("size") is None:
        raise DataError(f"{shown(given)}: the server does not say how large the file is", fix="fetch it first")
    safe = shown(address)
    opens = "" if safe == address else address
    return InputFile(safe, name, int(info["size"]), _version(info), opens=opens)


def _name_of(address: str, info: dict[str, Any]) -> str:
    """The name that tells the form of one remote file: of its path, its parameters, or of where the server sent us."""
    candidates = [*names(address), *names(str(info.get("url") or ""))]
    telling = (name for name in candidates if kind_of(name) or is_foreign(name))
    return next(telling, next(iter(candidates), "") or shown(address))


def _find_remote(given: str, suffixes: tuple[str, ...], left_out: LeftOut) -> list[InputFile]:
    source, root = filesystem(given)
    marks = "*" if given.startswith(("http://", "https://")) else "*?["
    try:
        try:  # a name is itself before it is a pattern
            info = source.info(root)
        except FileNotFoundError:
            if not any(mark in root.partition("?")[0] if marks == "*" else mark in root for mark in marks):
                raise
            base = root.split("*")[0].split("?")[0].split("[")[0].rpartition("/")[0]
            found = {p: i for p, i in source.glob(root, detail=True).items() if i.get("type") != "directory"}
            below = {p: p.removeprefix(base).lstrip("/") for p in found}
            return [_remote_input(given, with_path(given, p), i, below[p]) for p, i in found.items()]
        if info.get("type") != "directory":
            address = given if root else with_path(given, root)
            return [_remote_input(given, address, info, _name_of(given, info))]
        found = source.find(root, detail=True)
    except FileNotFoundError as error:
        cause = error.__cause__  # fsspec says of every answer of a web server that the file is not there
        if cause is None or getattr(cause, "status", None) in (404, 410):
            raise DataError(f"input {shown(given)} does not exist", fix=FIX) from None
        raise DataError(
            f"{shown(given)} cannot be fetched ({type(cause).__name__}: {without_secrets(cause)})",
            fix="run the same command again when it answers, or give an address that it grants",
        ) from None
    except DataError:
        raise
    except Exception as error:  # every remote store has exceptions of its own
        raise DataError(
            f"{shown(given)} cannot be listed ({type(error).__name__}: {without_secrets(error)})",
            fix="check the address",
        ) from None
    base = root.rstrip("/") + "/" if root.strip("/") else ""
    below = {path.removeprefix(base).lstrip("/"): path for path in found}
    hidden = {n for n in below if any(map(_is_hidden_folder, n.split("/")[:-1]))}
    left_out["hidden"] += [f"{shown(given)}/{name}" for name in sorted(hidden)]
    kept = _sift((name for name in below if name not in hidden), suffixes, left_out, f"{shown(given)}/")
    return [_remote_input(given, with_path(given, below[n]), found[below[n]], n) for n in kept]


def _refuse_untold(file: InputFile) -> None:
    """DataError for a file whose name says nothing of its form, unless its first bytes are plain text."""
    if kind_of(file.name):
        return
    if is_foreign(file.name):
        raise DataError(f"{file.address} is of a form that is not read", fix=FIX)
    found = seen_in(file.head())
    if found == "HTML" and re.search(r"\.[a-z]{1,5}$" if file.is_local else r"\.(html?|xml|svg)$", file.name.lower()):
        return  # page.html, a program that begins with a page, a picture in SVG: what is named is meant
    if found != "text":
        what = contradiction(file.address, file.head(), "text") or f"{file.address} looks like {found}"
        raise DataError(
            f"{what}, and its name does not tell its form",
            fix=f"give it a name that ends with one of: {', '.join(SUFFIXES)}",
        )


def _tell_apart(files: list[InputFile]) -> list[InputFile]:
    """The files, those of one name with as many of the folders above as it takes to tell them apart."""
    counts = Counter(file.name for file in files)
    groups: dict[str, list[int]] = defaultdict(list)
    for number, file in enumerate(files):
        if counts[file.name] > 1:
            groups[file.name].append(number)
    taken = {name for name in counts if name not in groups}
    found = list(files)
    for name, numbers in groups.items():
        # A name may hold folders already, which `parents` gives as well.
        above = [parents(files[n].address)[name.count("/") :] for n in numbers]
        longest = max(map(len, above))
        for depth in range(1, longest + 1):
            longer = ["/".join([*reversed(folders[:depth]), name]) for folders in above]
            if len(set(longer)) == len(longer) and taken.isdisjoint(longer):
                break
        else:
            longer = [f"{number}/{name}" for number in range(len(numbers))]
        taken.update(longer)
        for number, new in zip(numbers, longer, strict=True):
            found[number] = files[number].named(new)
    return found


def find_inputs(
    inputs: Iterable[str | os.PathLike[str]], suffixes: tuple[str, ...] = SUFFIXES, left_out: LeftOut | None = None
) -> list[InputFile]:
    """The files behind paths, folders and addresses, in an order that does not depend on any directory's listing.

    A folder contributes its files with one of `suffixes`, recursively. Others, hidden ones and those about the data (a
    README, a license, a loader beside records) are added to `left_out`, by reason. A file named directly is taken for text
    if neither its name nor its first bytes say anything else. DataError if an input is missing, empty, or of a form that
    is not read, or if a file would be read twice.
    """
    found: list[InputFile] = []
    others: LeftOut = defaultdict(list)
    for given in map(str, inputs):
        if not given.strip():
            raise DataError(f"input {given!r} is no name", fix=FIX)  # an unset variable of a shell
        if given.startswith("file://") and "::" not in given:
            given = given.removeprefix("file://")
            given = unquote(given) if not os.path.lexists(given) else given
        if is_address(given) and os.path.lexists(given):
            given = os.path.abspath(given)  # a file of this machine with such a name
        files = _find_remote(given, suffixes, others) if is_address(given) else _find_local(given, suffixes, others)
        if not files and not is_address(given) and not os.path.lexists(given):
            raise DataError(f"input {given} does not exist", fix=FIX)
        if not files:
            raise DataError(
                f"{shown(given)} holds no input files{_which(others)}", fix=f"expected one of: {', '.join(suffixes)}"
            )
        for file in files:
            _refuse_untold(file)
        found += sorted(files, key=lambda file: file.name)
    if not found:
        raise DataError("no input files given", fix=FIX)
    first: dict[tuple[int, int] | str, InputFile] = {}
    for file in found:
        other = first.setdefault(_same(file), file)
        if other is not file:
            again = "" if other.address == file.address else f", the other time as {other.address}"
            raise DataError(f"input {file.address} is given twice{again}", fix="name each file once")
    if left_out is not None:
        left_out.update({reason: sorted(files) for reason, files in others.items() if files})
    return _tell_apart(found)


def _which(left_out: LeftOut) -> str:
    """What was left out, in brackets, for a message; nothing if nothing was."""
    return f" ({left_out_line(left_out)})" if any(left_out.values()) else ""


def left_out_line(left_out: LeftOut) -> str:
    """One line for a person: how many were left out, why, and the first of each reason."""
    parts = []
    for reason, files in sorted(left_out.items()):
        if files:
            shown_files = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
            parts.append(f"{len(files):,} {reason} ({shown_files})")
    return f"left out: {'; '.join(parts)}"


def empty_line(files: Iterable[InputFile]) -> str | None:
    """One line that names files without a byte, which are often downloads that failed; None if there are none."""
    empty = [file.address for file in files if file.size_bytes == 0]
    if not empty:
        return None
    return f"{len(empty):,} input files are empty: {', '.join(empty[:3])}{', ...' if len(empty) > 3 else ''}"


__all__ = ["SUFFIXES", "HashedStream", "InputFile", "LeftOut", "empty_line", "find_inputs", "left_out_line"]
