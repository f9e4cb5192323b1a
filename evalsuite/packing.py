"""Makes bundles: from a local folder (`pack`), or from the hub or a mirror of it (`pull`). Each ends with its manifest."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from evalsuite import manifest
from evalsuite.data_sets import DATA_SETS, DataSet, Split, splits
from evalsuite.files import write_json_lines
from evalsuite.manifest import File
from tinyllama import scratch
from tinyllama.data.durable import cannot_write, durable
from tinyllama.errors import DataError, UserError

ARCHIVES = (".tar.zst", ".tar.gz")
PARTIAL = "manifest.partial.json"
Report = Callable[[str], None]


def is_archive(path: Path) -> bool:
    """Whether a bundle of this name is one file."""
    return path.name.endswith(ARCHIVES)


def _count(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as they are; how many there were."""
    number = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal number
        for row in rows:
            number += 1
            yield row

    write_json_lines(path, counted())
    if not number:
        path.unlink()
        raise DataError(f"{path.name} of {path.parent} has no rows", fix="leave it out")
    return number


def _local_rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix != ".parquet":
        yield from manifest.rows(path)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is corrupt ({str(error).splitlines()[0]})", fix="write it again") from None


def pack(source: Path, output: Path, report: Report) -> Path:
    """A verified bundle of a folder `<data set>/<config>/<split>.jsonl` or `.parquet`, as a folder or one archive.

    report(place) is called for each file. DataError where a row, a column or one of a set's tasks is missing.
    """
    if not source.is_dir():
        raise UserError(f"{source} is not a folder", fix="give a folder of <data set>/<config>/<split>.jsonl")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is there already", fix="give another name, or remove it")
    found = sorted(path for kind in ("jsonl", "parquet") for path in source.glob(f"*/*/*.{kind}"))
    if not found:
        raise UserError(
            f"{source} holds no <data set>/<config>/<split>.jsonl or .parquet", fix="see docs/evaluation.md"
        )
    old = manifest.read(source) or {}
    with scratch.folder(f".{output.name}-", _existing(output.parent)) as made:
        bundle = made / "bundle"
        files: dict[str, File] = {}
        for path in found:
            place = path.relative_to(source).with_suffix(".jsonl")
            if str(place) in files:
                raise UserError(f"{path} is there as .jsonl too", fix="keep one of them")
            rows = _count(bundle / place, _local_rows(path))
            before = old.get(str(place))
            files[str(place)] = manifest.describe(
                bundle / place, place, rows, *((before.revision, before.licence) if before else ())
            )
            if before and before.sha256 != files[str(place)].sha256:
                raise DataError(f"{path} is not what its folder's manifest says (sha256)", fix="remove the manifest")
            report(str(place))
        manifest.write(bundle, files)
        problems = [problem for finding in manifest.verify(bundle) for problem in finding.problems]
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise DataError(f"{source}: {problems[0]}{more}", fix="complete the folder")
        if is_archive(output):
            _archive(bundle, output)
        else:
            with contextlib.suppress(FileNotFoundError):
                output.rmdir()
            os.chmod(bundle, 0o755)
            os.replace(bundle, output)
    return output


def _existing(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(error, folder) from None
    return folder


@contextlib.contextmanager
def _compressed(stream: IO[bytes], name: str) -> Iterator[Any]:
    if name.endswith(".gz"):
        with gzip.GzipFile(fileobj=stream, mode="wb", mtime=0, filename="") as packed:
            yield packed
        return
    import zstandard

    with zstandard.ZstdCompressor(level=10).stream_writer(stream, closefd=False) as packed:
        yield packed


def _archive(bundle: Path, output: Path) -> None:
    """One file of a bundle: the same bytes for the same content."""
    with (
        durable(output, "wb") as stream,
        _compressed(stream, output.name) as packed,
        tarfile.open(fileobj=packed, mode="w|") as archive,
    ):
        for path in sorted(p for p in bundle.rglob("*") if p.is_file()):
            entry = tarfile.TarInfo(str(path.relative_to(bundle)))
            entry.size, entry.mode = path.stat().st_size, 0o644
            with open(path, "rb") as content:
                archive.addfile(entry, content)


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """A bundle's folder: of an archive, one that lasts as long as the block."""
    if not is_archive(path):
        yield path
        return
    import zstandard

    with scratch.folder("tinyllama-bundle-") as made:
        try:
            with open(path, "rb") as stream:
                opened: Any = gzip.GzipFile(fileobj=stream) if path.name.endswith(".gz") else None
                opened = opened or zstandard.ZstdDecompressor().stream_reader(stream)
                with tarfile.open(fileobj=opened, mode="r|") as archive:
                    archive.extractall(made / "bundle", filter="data")
        except (OSError, EOFError, tarfile.TarError, zstandard.ZstdError) as error:
            raise DataError(f"{path} cannot be unpacked ({error})", fix=manifest.AGAIN) from None
        yield made / "bundle"


def pull(output: Path, mirror: Path | None, report: Report) -> dict[str, File]:
    """Fetch every split of the suites' data sets through `datasets`. Run again after an interruption: what is finished, of
    the same revision, is kept. mirror: a folder with the hub's repositories as `owner/name` in place of the hub.

    report(text) is called for each split. DataError in one line where the hub cannot be reached.
    """
    _existing(output)
    if manifest.read(output) is None and any(output.iterdir()) and not (output / PARTIAL).exists():
        raise UserError(f"{output} holds other files", fix="give an empty folder, or one that pull has begun")
    kept = manifest.read(output, PARTIAL) or manifest.read(output) or {}
    files: dict[str, File] = {}
    for data_set in DATA_SETS:
        revision, licence = _revision(data_set, mirror)
        for split in (s for s in splits() if s.data_set is data_set):
            place, old = str(split.place), kept.get(str(split.place))
            if old and old.revision == revision and _is_whole(output / place, old):
                files[place] = old
                report(f"{place} (kept)")
                continue
            rows = _count(output / place, _hub_rows(split, mirror, revision))
            files[place] = manifest.describe(output / place, split.place, rows, revision, licence)
            manifest.write(output, {**kept, **files}, PARTIAL)
            report(place)
    manifest.write(output, files)
    (output / PARTIAL).unlink(missing_ok=True)
    return files


def _is_whole(path: Path, entry: File) -> bool:
    return path.is_file() and path.stat().st_size == entry.bytes and manifest.Sums.shared().of(path) == entry.sha256


def _unreachable(data_set: DataSet, error: Exception, mirror: Path | None) -> DataError:
    if mirror:
        return DataError(f"{mirror / data_set.hub} cannot be read ({_first_line(error)})", fix="complete the mirror")
    from huggingface_hub import constants

    return DataError(
        f"{data_set.hub} cannot be fetched from {constants.ENDPOINT} ({_first_line(error)})",
        fix="run this where the hub can be reached, and copy the folder; finished splits are kept",
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def _revision(data_set: DataSet, mirror: Path | None) -> tuple[str | None, str | None]:
    """A data set's newest commit on the hub and its licence there."""
    if mirror:
        if not (mirror / data_set.hub).is_dir():
            raise DataError(f"the mirror has no {mirror / data_set.hub}", fix="complete the mirror")
        return None, None
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(data_set.hub, timeout=30)
    except Exception as error:  # noqa: BLE001 - its HTTP library, which differs, has errors of its own
        raise _unreachable(data_set, error, None) from None
    licence = getattr(info.card_data, "license", None) if info.card_data else None
    return info.sha, licence if isinstance(licence, str) and licence not in ("unknown", "other") else None


def _hub_rows(split: Split, mirror: Path | None, revision: str | None) -> Iterator[dict[str, Any]]:
    """A split's rows, as `datasets` reads them."""
    import datasets

    datasets.disable_progress_bars()
    place = str(mirror / split.data_set.hub) if mirror else split.data_set.hub
    try:
        found = datasets.load_dataset(place, split.config, split=split.split, revision=revision)
    except Exception as error:  # noqa: BLE001 - as above
        raise _unreachable(split.data_set, error, mirror) from None
    yield from found


def as_json(findings: list[manifest.Finding]) -> str:
    """What `verify` found."""
    entries = [vars(finding) for finding in findings]
    return json.dumps({"whole": not any(f.problems for f in findings), "data_sets": entries}, indent=2)
