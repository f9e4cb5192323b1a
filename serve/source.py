"""The MODEL argument: what it is, where vLLM can load it from, and its provenance. Imports torch only to export.

A training checkpoint is exported first, next to the run (RUN/exports/step-N-KEY), keyed on the checkpoint's manifest,
which lists the hash of every file in it; the export is used again only while its content hash still holds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyllama.errors import UserError
from tinyllama.model.config import ModelConfig

RECORD = "tinyllama_export.json"
HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$", re.ASCII)
EXAMPLES = "give an export, a Hugging Face directory, RUN/checkpoints/step-N, a run, or a hub id such as org/name"


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that vLLM can be asked to load: a Hugging Face directory or a hub id."""

    location: str
    name: str
    config: dict[str, Any]
    record: dict[str, Any]

    @property
    def max_positions(self) -> int | None:
        """Longest context of the model in tokens, where its config.json says so."""
        return self.config.get("max_position_embeddings")

    @property
    def kv_values_per_token(self) -> int | None:
        """Numbers that one token adds to the KV cache, 2*L*K*D, where config.json says enough to know."""
        heads = self.config.get("num_attention_heads")
        layers, width = self.config.get("num_hidden_layers"), self.config.get("hidden_size")
        if not (heads and layers and width):
            return None
        head_dim = self.config.get("head_dim") or width // heads
        return 2 * layers * (self.config.get("num_key_value_heads") or heads) * head_dim

    @property
    def dtype(self) -> str | None:
        """The dtype that config.json declares."""
        return self.config.get("dtype") or self.config.get("torch_dtype")

    @property
    def quantization(self) -> dict[str, Any] | None:
        """Which scheme the weights are in, and the bytes that they take on disk; None if they are not quantized."""
        config = self.config.get("quantization_config")
        if not config:
            return None
        made = self.record.get("quantization", {})
        stored = sum(file.stat().st_size for file in Path(self.location).glob("*.safetensors"))
        method = " ".join(filter(None, (config.get("quant_method"), config.get("format"))))
        return {
            "scheme": made.get("scheme", method),
            "description": made.get("description", method),
            "weight_bytes": made.get("bytes_after", stored or None),
        }

    @property
    def stored_bytes(self) -> int | None:
        """Bytes of quantized weights; None where they are not quantized."""
        return self.quantization["weight_bytes"] if self.quantization else None

    @property
    def rounds_inputs(self) -> bool:
        """Whether its matrices multiply int8 or fp8 inputs, and so compute faster than the peak of the model's dtype."""
        groups = (self.config.get("quantization_config") or {}).get("config_groups", {})
        return any(group.get("input_activations") for group in groups.values())

    @property
    def shape(self) -> ModelConfig | None:
        """The Llama shape, for the arithmetic; None for an architecture that this toolkit has no formulas for."""
        if not Path(self.location).is_dir():
            return None
        try:
            return ModelConfig.from_hf(self.location)
        except (UserError, KeyError):
            return None

    def content(self) -> str:
        """The hash of what lies there now, as an evaluation records it; of a model of the hub its id, whose content nobody
        has here before it is loaded.
        """
        from tinyllama.export import content_sha256

        if not Path(self.location).is_dir():
            return f"hub:{self.location}"
        return content_sha256(self.location)

    def recorded_content(self) -> str:
        """`content` as the export's record has it, where there is one: nothing is read again."""
        return self.record.get("content_sha256") or self.content()

    def describe(self) -> dict[str, Any]:
        """The part of bench.json that says which model was measured."""
        shape = self.shape
        return {
            "path": self.location,
            "name": self.name,
            "content_sha256": self.record.get("content_sha256"),
            "step": self.record.get("step"),
            "trained_tokens": self.record.get("tokens"),
            "num_parameters": shape.num_parameters if shape else None,
            "quantization": self.quantization,
            "config": shape.to_dict() if shape else None,
        }


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error})", fix="export the model again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object", fix="export the model again")
    return found


def _directory(path: Path, name: str) -> Source:
    """A Hugging Face directory, checked for the files without which vLLM would fail half a minute later."""
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise UserError(f"{path} has a config.json but no weights", fix="give a complete Hugging Face directory")
    if not any((path / file).exists() for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise UserError(f"{path} has no tokenizer", fix="export the model again, or save its tokenizer there")
    record = _read(path / RECORD) if (path / RECORD).exists() else {}
    return Source(str(path), name, _read(path / "config.json"), record)


def _exported(checkpoint_dir: Path, report: Callable[[str], None]) -> Path:
    """The export of a checkpoint: the one made before if its content hash still holds, else a new one."""
    from tinyllama.export import content_sha256, export_checkpoint

    key = hashlib.sha256((checkpoint_dir / "manifest.json").read_bytes()).hexdigest()[:12]
    run = checkpoint_dir.parent.parent if checkpoint_dir.parent.name == "checkpoints" else checkpoint_dir.parent
    target = run / "exports" / f"{checkpoint_dir.name}-{key}"
    if (target / RECORD).exists() and _read(target / RECORD).get("content_sha256") == content_sha256(target):
        report(f"using the export in {target}")
    else:
        report(f"exporting {checkpoint_dir} to {target}")
        export_checkpoint(checkpoint_dir, target)
    return target


def resolve(model: str, report: Callable[[str], None]) -> Source:
    """What `model` names; UserError if nothing. `report` is told what takes time."""
    path = Path(model)
    if path.is_dir():
        resolved = path.resolve()
        if (path / "config.json").exists() and "architectures" in _read(path / "config.json"):
            return _directory(path, resolved.name)
        if (path / "manifest.json").exists() or (path / "checkpoints").is_dir():
            from tinyllama import checkpoint

            found = checkpoint.resolve(path).resolve()
            run = found.parent.parent.name if found.parent.name == "checkpoints" else found.parent.name
            return _directory(_exported(found, report), f"{run}-{found.name}")
        raise UserError(f"{path} is not a model: no Hugging Face config.json, no checkpoint", fix=EXAMPLES)
    if path.exists():
        raise UserError(f"{path} is a file, not a model directory", fix=EXAMPLES)
    if model.startswith((".", "/", "~")) or not HUB_ID.match(model) or (path.parent.is_dir() and "/" in model):
        raise UserError(f"{model} does not exist", fix=EXAMPLES)
    return _hub(model)


def _hub(model: str) -> Source:
    """A model on the hub (or in its local cache): only config.json is fetched here, vLLM fetches the rest."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        config = hf_hub_download(model, "config.json")
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{model} is no directory here and cannot be had from the hub ({reason})", fix=EXAMPLES
        ) from None
    return Source(model, model.rsplit("/", 1)[-1], _read(Path(config)), {})
