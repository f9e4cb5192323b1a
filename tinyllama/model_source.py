"""The MODEL argument of every command: what it names, where it lies, and whether it can be used. Torch-free.

`find` tells a training checkpoint (RUN/checkpoints/step-N, or a run: its newest), a Hugging Face directory (an export, or
anybody's) and a hub id apart. What is no model is one line with the nearest names that exist, without a network: only
what cannot be a path is looked for on the hub, once and for a bounded time. `ModelSource.check` reads the small files and
the headers of the weights before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
import threading
from pathlib import Path
from typing import Any

from tinyllama import checkpoint
from tinyllama.errors import ConfigError, UserError
from tinyllama.model import stored, tokenizer_files
from tinyllama.model.config import HEAD, LLAMA_LIKE, ModelConfig, check_fields, decoder_tensors, llama_tensors

RECORD = "tinyllama_export.json"
GIVE = "give an export, a Hugging Face directory, RUN/checkpoints/step-N, a run, or a hub id such as org/name"
GIVE_LOCAL = "give an export, a Hugging Face directory, RUN/checkpoints/step-N, or a run"
HUB_ID = re.compile(r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?", re.ASCII)
# The hub has names without an owner only from its first years; of these a causal language model can be.
OWNERLESS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2", "openai-gpt")
FILE_ENDINGS = (".safetensors", ".json", ".bin", ".pt", ".pth", ".gguf", ".model", ".partial", ".yaml")
HUB_SECONDS = 10.0
TYPO = 0.8  # names that are so much alike are taken for each other before a hub is asked
LISTED = 200  # entries of a folder that are looked at for a similar name, or for a model inside


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model that exists. kind: "checkpoint", "directory" or "hub"; location: its folder, of a run the newest
    checkpoint's, or its hub id. snapshot: the folder of a hub model in the cache, where no network may be used.
    """

    given: str
    kind: str
    location: str
    snapshot: str | None = None

    @property
    def path(self) -> Path:
        """The folder of a local model."""
        return Path(self.location)

    @property
    def loadable(self) -> str:
        """What transformers and vLLM are to load."""
        return self.snapshot or self.location

    @property
    def is_checkpoint(self) -> bool:
        return self.kind == "checkpoint"

    @property
    def is_hub(self) -> bool:
        return self.kind == "hub"

    @property
    def name(self) -> str:
        """Short, for tables and folders: of a checkpoint RUN-step-N."""
        if self.is_hub:
            return self.location.rsplit("/", 1)[-1]
        folder = self.path.resolve()
        if not self.is_checkpoint:
            return folder.name
        return f"{_run_of(folder).name}-{folder.name}"

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """config.json, of a checkpoint as its export would have it. Of a hub model it is fetched, unless it is cached."""
        if self.is_checkpoint:
            return checkpoint.model_config(self.path).to_hf()
        return stored.read_config(
            _from_hub(self.location).parent if self.is_hub and not self.snapshot else Path(self.loadable)
        )

    def llama(self) -> ModelConfig:
        """The shape of a Llama that this toolkit's own code can compute. ConfigError with the reason for any other model."""
        if self.is_hub:
            raise ConfigError(
                f"{self.location} is a hub id, its files are not here", fix="download it and give its folder"
            )
        return checkpoint.model_config(self.path) if self.is_checkpoint else ModelConfig.from_hf(self.path)

    def content_sha256(self) -> str:
        """Identity of weights and tokenizer: of a folder by content, of a checkpoint by its manifest, which lists the
        checksum of every file; of a hub model its id, whose content nobody has here before it is loaded.
        """
        from tinyllama.data.store import file_sha256
        from tinyllama.export import content_sha256

        if self.is_hub:
            return f"hub:{self.location}"
        return file_sha256(self.path / "manifest.json") if self.is_checkpoint else content_sha256(self.path)

    def record(self) -> dict[str, Any]:
        """What the export that made this directory wrote about it; empty for anybody else's."""
        file = self.path / RECORD
        return stored.read_object(file) if self.kind == "directory" and file.exists() else {}

    def check(self, *, ours: bool, tokenizer: bool = True) -> None:
        """Refuse what would fail after it was loaded: damaged files, weights that are not the configuration's, no tokenizer.

        ours: whether our own Llama is to compute it, or else transformers or vLLM, who know other architectures too. A
        checkpoint's weights have checksums, which are verified when they are read; of hub models nothing is here.
        """
        if ours:
            self.llama()
        if self.is_hub and self.snapshot is None:
            return
        if self.is_checkpoint:
            if tokenizer and not (self.path / "tokenizer.model").exists():
                raise ConfigError(
                    f"{self.path} holds no tokenizer.model",
                    fix="export it with: tinyllama export CHECKPOINT --output DIR --tokenizer FILE",
                )
            return
        folder, raw = Path(self.loadable), self.config
        stored.find_weights(folder)
        if tokenizer:
            size = raw.get("vocab_size")
            tokenizer_files.check(folder, size if type(size) is int else None)
        self.record()
        _check_weights(folder, raw, ours)


def find(
    model: str | os.PathLike[str], option: str | None = None, *, offline: bool = False, local: bool = False
) -> ModelSource:
    """What MODEL names; UserError if nothing.

    option: as which it was given, for the message (`--model`). offline: of the hub only what its cache holds. local: only a
    folder will do.
    """
    text = os.fspath(model)
    shown = f"{option} {text}" if option else text
    path = Path(os.path.expanduser(text))
    if not text.strip() or "\0" in text:
        raise UserError(f"{shown!r} is no model", fix=GIVE)
    try:
        if not path.exists():
            if local:
                raise missing(shown, text, GIVE_LOCAL)
            return _not_here(text, path, shown, offline)
        if not path.is_dir():
            raise UserError(f"{shown} is a file, not a model directory", fix=_folder_of_file(path))
        return _folder(text, path, shown)
    except OSError as error:
        raise UserError(f"{shown} cannot be read ({error.strerror})", fix=GIVE) from None


def _folder(text: str, path: Path, shown: str) -> ModelSource:
    """The model in a folder that exists."""
    names = set(os.listdir(path))
    if not names:
        raise UserError(f"{shown} is not a model: the folder is empty", fix=GIVE)
    folder = path.resolve().name
    if folder.endswith(".partial") or folder.startswith("partial-"):
        raise UserError(
            f"{shown} is unfinished: what wrote it was stopped", fix="run that command again, or give another"
        )
    if checkpoint.is_checkpoint(path) and not (stored.CONFIG in names and _describes_a_model(path)):
        return ModelSource(text, "checkpoint", str(checkpoint.resolve(path)))
    if stored.CONFIG in names and ("checkpoints" not in names or _describes_a_model(path)):
        return ModelSource(text, "directory", str(path))
    if "checkpoints" in names:
        raise UserError(
            f"{shown} is a run that has no finished checkpoint yet", fix="train it further, or give another"
        )
    inside = _models_in(path)
    raise UserError(
        f"{shown} is not a model: no Hugging Face config.json, no checkpoint",
        fix=f"give one of {', '.join(inside)}" if inside else GIVE,
    )


def _describes_a_model(path: Path) -> bool:
    """Whether config.json is a Hugging Face model's, and not a run's."""
    try:
        raw = stored.read_object(path / stored.CONFIG)
    except UserError:
        return False
    return "model_type" in raw or "architectures" in raw


def _models_in(path: Path) -> list[str]:
    """Runs, checkpoints and exports right in this folder, or in its `checkpoints`: at most three, for a message."""
    found = []
    for entry in sorted(_entries(path)):
        below = path / entry
        if (below / "manifest.json").exists() or (below / stored.CONFIG).exists() or (below / "checkpoints").is_dir():
            found.append(str(below))
    return found[-3:] if any("step-" in name for name in found) else found[:3]


def _entries(path: Path) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return [entry.name for entry, _ in zip(entries, range(LISTED), strict=False)]
    except OSError:
        return []


def _folder_of_file(path: Path) -> str:
    """What to give in place of a file: its folder, where that holds a model."""
    here = path.parent
    return f"give its folder, {here}" if (here / stored.CONFIG).exists() else GIVE


def similar(text: str | os.PathLike[str], cutoff: float = 0.6) -> list[str]:
    """Existing paths like one that does not exist: the nearest names where its first missing part should be."""
    here, rest = _first_missing(text)
    if not rest:
        return []
    lower = {name.lower(): name for name in _entries(here) if not name.startswith(".") or rest[0].startswith(".")}
    close = [lower[name] for name in difflib.get_close_matches(rest[0].lower(), list(lower), n=3, cutoff=cutoff)]
    longest = [here.joinpath(name, *rest[1:]) for name in close]
    return [str(path if path.exists() else here / name) for path, name in zip(longest, close, strict=True)]


def _first_missing(text: str | os.PathLike[str]) -> tuple[Path, list[str]]:
    """The longest part of a path that is a folder, and the names behind it."""
    path = Path(os.path.expanduser(text))
    here, rest = Path(path.anchor), list(path.relative_to(path.anchor).parts)
    while rest and (here / rest[0]).is_dir():
        here /= rest.pop(0)
    return here, rest


def missing(shown: str, text: str | os.PathLike[str], fix: str) -> UserError:
    """The error for a path that does not exist: what is like it, what is in its folder, or else `fix`."""
    near = similar(text)
    if near:
        return UserError(f"{shown} does not exist", fix=f"did you mean {' or '.join(near)}?")
    here, rest = _first_missing(text)
    beside = [] if here == Path(here.anchor) else sorted(name for name in _entries(here) if not name.startswith("."))
    if len(rest) == 1 and beside:
        more = " ..." if len(beside) > 3 else ""
        return UserError(f"{shown} does not exist", fix=f"{fix}; in {here} there is {', '.join(beside[:3])}{more}")
    return UserError(f"{shown} does not exist", fix=fix)


def _not_here(text: str, path: Path, shown: str, offline: bool) -> ModelSource:
    """A name that no file has: a hub id, or a mistake."""
    parts = text.split("/")
    if any(parent.is_symlink() for parent in (path, *path.parents) if not parent.exists()):
        raise UserError(f"{shown} is a link to something that does not exist", fix=GIVE)
    well_formed = len(parts) <= 2 and all(HUB_ID.fullmatch(part) and ".." not in part for part in parts)
    if not well_formed or text.endswith(FILE_ENDINGS) or len(text) > 96:
        raise missing(shown, text, GIVE)
    here = cached_config(text)
    if here is None:
        owned = len(parts) == 2 and not os.path.lexists(parts[0]) and not similar(text, TYPO)
        if not owned and text not in OWNERLESS:
            raise missing(shown, text, GIVE)
        here = _from_hub(text, shown, offline)
    return ModelSource(text, "hub", text, str(here.parent) if offline else None)


def cached_config(hub_id: str) -> Path | None:
    """config.json of a hub model in the local cache, by its layout: no network, no imports."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    caches = [os.environ.get(name) for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")]
    cache = Path(next(filter(None, caches), os.path.join(home, "hub"))).expanduser()
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    try:
        commit = (repository / "refs" / "main").read_text().strip()
        found = repository / "snapshots" / commit / stored.CONFIG
        return found if found.is_file() else None
    except (OSError, ValueError):
        return None


def _from_hub(hub_id: str, shown: str | None = None, offline: bool = False) -> Path:
    """config.json of a hub model: the cached one, or asked for once, in at most HUB_SECONDS. UserError."""
    here = cached_config(hub_id)
    if here is not None:
        return here
    what = f"{shown or hub_id} is no path here"
    forbidden = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    if offline or forbidden.upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(f"{what} and not in the hub's cache, and nothing may touch the network", fix=GIVE)
    answer: list[Path | Exception] = []

    def ask() -> None:
        try:
            import logging

            from huggingface_hub import hf_hub_download, hf_hub_url
            from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, get_session

            logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it tells each retry
            # Its download tries six times; where there is no network, once is enough to know.
            get_session().head(hf_hub_url(hub_id, stored.CONFIG), timeout=HUB_SECONDS)
            disable_progress_bars()
            answer.append(Path(hf_hub_download(hub_id, stored.CONFIG, etag_timeout=HUB_SECONDS)))
            enable_progress_bars()
        except Exception as error:
            answer.append(error)

    asking = threading.Thread(target=ask, daemon=True)  # a name server that does not answer has no timeout of ours
    asking.start()
    asking.join(HUB_SECONDS)
    if not answer:
        raise UserError(f"{what}, and the hub does not answer within {HUB_SECONDS:.0f} s", fix=GIVE)
    found = answer[0]
    if isinstance(found, Path):
        return found
    name = type(found).__name__
    reasons = {
        "RepositoryNotFoundError": "the hub has no such model, or not for you",
        "GatedRepoError": "the hub has it, but its owner must grant you access",
        "RemoteEntryNotFoundError": "the hub's has no config.json",
        "EntryNotFoundError": "the hub's has no config.json",
    }
    text = str(found).strip().splitlines()
    reason = reasons.get(name) or f"the hub cannot be reached: {text[0][:200] if text else name}"
    raise UserError(f"{what}, and {reason}", fix=GIVE)


def _run_of(folder: Path) -> Path:
    """The run of a checkpoint folder; where that was copied out of one, the folder that it lies in."""
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent


def _check_weights(directory: Path, raw: dict[str, Any], ours: bool) -> None:
    """The weights of a directory against its config.json, as far as the architecture is known here."""
    quantized = bool(raw.get("quantization_config"))
    if raw["model_type"] != "llama":
        known = raw["model_type"] in LLAMA_LIKE and not quantized
        stored.check_weights(directory, decoder_tensors(raw) if known else None, whole=False)
        return
    check_fields(raw, directory / stored.CONFIG)
    if ours:
        stored.tensors(directory)  # also refuses what is not in safetensors
    if quantized:
        stored.check_quantized(directory, llama_tensors(raw))
    else:
        stored.check_weights(
            directory, llama_tensors(raw), optional={HEAD} if raw.get("tie_word_embeddings") else set()
        )
