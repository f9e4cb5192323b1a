"""`manifest.json` of a bundle: each file's sha256, size, rows and source. Checked whenever a file is evaluated.

Hashes of files that have not changed (size and time) are kept in the user's cache folder, so that a check costs nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evalsuite.data_sets import DATA_SETS, Split, split_at
from evalsuite.files import write_json
from tinyllama import __version__
from tinyllama.data.durable import read_json
from tinyllama.data.store import file_sha256
from tinyllama.errors import DataError, UserError

NAME = "manifest.json"
FORMAT = "tinyllama-eval-bundle-1"
AGAIN = "fetch or pack the bundle again"


@dataclasses.dataclass(frozen=True)
class File:
    """What a manifest says of one file. source: the data set on the hub; revision: its commit there."""

    sha256: str
    bytes: int
    rows: int
    source: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    licence: str | None = None


def describe(path: Path, place: Path, rows: int, revision: str | None = None, licence: str | None = None) -> File:
    """The entry of a file that was just written. place: its path in the bundle."""
    split = split_at(place)
    config = place.parent.name if len(place.parts) == 3 and place.parent.name != "default" else None
    known = split.data_set.licence if split else None
    source = split.data_set.hub if split else place.parts[0].replace("__", "/", 1)
    return File(
        file_sha256(path), path.stat().st_size, rows, source, config, place.stem, revision, licence or known
    )  # fmt: skip


def write(bundle: Path, files: dict[str, File], name: str = NAME) -> None:
    """Write a manifest, atomically."""
    entries = {place: dataclasses.asdict(files[place]) for place in sorted(files)}
    write_json(bundle / name, {"format": FORMAT, "tinyllama": __version__, "files": entries})


def read(bundle: Path, name: str = NAME) -> dict[str, File] | None:
    """The entries of a bundle's manifest; None without one. DataError if it is none of ours."""
    path = bundle / name
    if not path.exists():
        return None
    found = read_json(path)
    try:
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r}")
        if outside := [place for place in found["files"] if Path(place).is_absolute() or ".." in Path(place).parts]:
            raise ValueError(f"file {outside[0]!r} is not in the bundle")
        return {place: File(**entry) for place, entry in found["files"].items()}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is not a bundle's manifest ({error})", fix=AGAIN) from None


@functools.lru_cache(maxsize=8)
def _entries(bundle: Path, _: int) -> dict[str, File] | None:
    return read(bundle)


def entries(bundle: Path) -> dict[str, File] | None:
    """As `read`, but once for a file that does not change."""
    path = bundle / NAME
    return _entries(bundle, path.stat().st_mtime_ns) if path.exists() else None


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tinyllama" / "sha256.json"


class Sums:
    """Hashes of files, kept over processes by path, size and time of change."""

    def __init__(self) -> None:
        self._path = _cache()
        kept = read_json(self._path)
        self._kept: dict[str, list[Any]] = kept if isinstance(kept, dict) else {}
        self._new = False

    @classmethod
    @functools.cache
    def shared(cls) -> Sums:
        """This process's."""
        return cls()

    def of(self, path: Path) -> str:
        """A file's sha256."""
        status = path.stat()
        key, stamp = str(path), [status.st_size, status.st_mtime_ns]
        kept = self._kept.get(key)
        if not isinstance(kept, list) or len(kept) != 3 or kept[:2] != stamp:
            kept = [*stamp, file_sha256(path)]
            self._kept[key], self._new = kept, True
        return str(kept[2])

    def save(self) -> None:
        """Keep what is new for other processes; a cache that cannot be written is none."""
        if self._new:
            self._new = False
            self._kept = {key: kept for key, kept in self._kept.items() if os.path.exists(key)}
            with contextlib.suppress(UserError, OSError):
                write_json(self._path, self._kept)


def check(bundle: Path, folder: Path) -> None:
    """DataError if a file that the manifest has in this folder is missing or another one. Without a manifest: nothing."""
    found = entries(bundle)
    if found is None:
        return
    for place, entry in found.items():
        path = bundle / place
        if path.parent == folder:
            if not path.is_file():
                raise DataError(f"the bundle has no {path}, which its manifest names", fix=AGAIN)
            if path.stat().st_size != entry.bytes or Sums.shared().of(path) != entry.sha256:
                raise DataError(f"{path} is not what the bundle's manifest says (sha256)", fix=AGAIN)
    Sums.shared().save()


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file; DataError names the first line that is none."""
    with open(path, encoding="utf-8") as stream:
        number = 0
        try:
            for line in stream:
                number += 1
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("not an object")
                    yield row
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number} is corrupt ({error})", fix=AGAIN) from None


@dataclasses.dataclass
class Finding:
    """What `verify` found of one data set: its configurations and files, rows, bytes, and what is wrong."""

    data_set: str
    configs: int
    expected: int | None
    files: int
    rows: int
    bytes: int
    problems: list[str]


def _verify_file(bundle: Path, place: Path, entry: File | None, split: Split | None, finding: Finding) -> None:
    path = bundle / place
    if not path.is_file():
        finding.problems.append(f"{place} is missing")
        return
    finding.files, finding.bytes = finding.files + 1, finding.bytes + path.stat().st_size
    if entry and file_sha256(path) != entry.sha256:
        finding.problems.append(f"{place} is corrupt: its sha256 is not the manifest's")
        return
    count, lacking = 0, set[str]()
    try:
        for row in rows(path):
            count += 1
            lacking |= set(split.data_set.columns) - set(row) if split else set()
    except DataError as error:
        finding.problems.append(error.what.replace(f"{bundle}/", ""))
        return
    finding.rows += count
    if not count:
        finding.problems.append(f"{place} is empty")
    if entry and count != entry.rows:
        finding.problems.append(f"{place} has {count:,} rows, the manifest says {entry.rows:,}")
    if lacking:
        finding.problems.append(f"{place} lacks columns that its task reads: {', '.join(sorted(lacking))}")


def verify(bundle: Path) -> list[Finding]:
    """Everything about a bundle: each data set that it holds, whole or not, with all that is wrong."""
    listed = read(bundle)
    places = {path.relative_to(bundle) for path in bundle.rglob("*.jsonl")} | {Path(place) for place in listed or {}}
    found = []
    for data_set in DATA_SETS:
        own = {place for place in places if place.parts[0] == data_set.folder}
        if own:
            needed = {Split(data_set, config, split).place for config in data_set.configs for split in data_set.asked}
            configs = {place.parent.name for place in own if (bundle / place).is_file()}
            finding = Finding(data_set.hub, len(configs), len(data_set.configs), 0, 0, 0, [])
            for place in sorted(own | needed):
                _verify_file(bundle, place, (listed or {}).get(str(place)), split_at(place), finding)
            found.append(finding)
    known = {data_set.folder for data_set in DATA_SETS}
    for folder in sorted({place.parts[0] for place in places} - known):
        own = {place for place in places if place.parts[0] == folder}
        finding = Finding(folder.replace("__", "/", 1), len({place.parent for place in own}), None, 0, 0, 0, [])
        for place in sorted(own):
            _verify_file(bundle, place, (listed or {}).get(str(place)), None, finding)
        found.append(finding)
    if not found:
        raise DataError(f"{bundle} holds no data sets", fix="a bundle has <data set>/<config>/<split>.jsonl")
    return found
