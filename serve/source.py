"""The MODEL argument: what it is, where vLLM can load it from, and its provenance. Imports torch only to export.

A training checkpoint is exported first, next to the run (RUN/exports/step-N-KEY), keyed on the checkpoint's manifest,
which lists the hash of every file in it; the export is used again only while its content hash still holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyllama import model_source
from tinyllama.data.durable import read_json
from tinyllama.errors import ConfigError, UserError
from tinyllama.model import stored
from tinyllama.model.config import ModelConfig
from tinyllama.model_source import ModelSource


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
        except UserError:
            return None

    def content(self) -> str:
        """The hash of what lies there now, as an evaluation records it; of a model of the hub its id, whose content nobody
        has here before it is loaded.
        """
        from tinyllama.export import content_sha256

        if not Path(self.location).is_dir():
            return f"hub:{self.location}"
        return content_sha256(self.location)

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


def _exported(found: ModelSource, report: Callable[[str], None]) -> Path:
    """The export of a checkpoint: the one made before if its content hash still holds, else a new one."""
    from tinyllama.export import RECORD, content_sha256, export_checkpoint

    folder = found.path.resolve()
    key = found.content_sha256()[:12]
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    target = run / "exports" / f"{folder.name}-{key}"
    record = read_json(target / RECORD)
    if isinstance(record, dict) and record.get("content_sha256") == content_sha256(target):
        report(f"using the export in {target}")
    else:
        report(f"exporting {folder} to {target}")
        export_checkpoint(folder, target)
    return target


def resolve(model: str, report: Callable[[str], None], option: str | None = None) -> Source:
    """What `model` names, checked for what vLLM would fail of half a minute later; UserError. `report` is told what takes
    time. option: as which it was given.
    """
    found = model_source.find(model, option)
    found.check(ours=False)
    activation = found.config.get("hidden_act", "silu")
    if found.config.get("model_type") == "llama" and activation != "silu":
        raise ConfigError(
            f"{found.location}: hidden_act {activation!r}: vLLM's Llama computes silu alone", fix="evaluate it with hf"
        )
    if found.kind == "directory" and found.config.get("model_type") == "llama":
        stored.refuse_what_vllm_prefers(found.path)
    if found.is_hub:
        return Source(found.location, found.name, found.config, {})
    if not found.is_checkpoint:
        return Source(found.location, found.name, found.config, found.record())
    exported = model_source.find(_exported(found, report))
    return Source(exported.location, found.name, exported.config, exported.record())
