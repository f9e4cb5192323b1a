"""The shape of a Llama, and the arithmetic that follows from it. Torch-free.

Field names are Hugging Face's, so that a `config.json` of an export is this object and a few constants. Parameter counts
and FLOPs per token are exact functions of the shape; the three FLOPs conventions in use are all here, named.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from tinyllama.errors import ConfigError, nearest


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama-2-architecture decoder: pre-norm RMSNorm, half-split RoPE, grouped-query attention, SwiGLU, untied head."""

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 22
    num_attention_heads: int = 32
    num_key_value_heads: int = 4
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
                raise ConfigError(f"model.{field.name}={value!r} is not a positive number", fix="correct the recipe")
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} over num_attention_heads={self.num_attention_heads} "
                "is not an even whole number",
                fix="choose a hidden_size that is a multiple of twice the number of heads",
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"model.num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}",
                fix="grouped-query attention needs the same number of query heads in each group",
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_dim(self) -> int:
        """Width of all key (or value) heads together."""
        return self.head_dim * self.num_key_value_heads

    @property
    def num_matmul_parameters(self) -> int:
        """Weights used in matrix products: everything but the input embedding and the norms."""
        h, layer = self.hidden_size, 0
        layer += 2 * h * h + 2 * h * self.kv_dim  # q_proj, o_proj; k_proj, v_proj
        layer += 3 * h * self.intermediate_size  # gate_proj, up_proj, down_proj
        return self.num_hidden_layers * layer + self.vocab_size * h

    @property
    def num_parameters(self) -> int:
        """All weights. TinyLlama 1.1B: 1,100,048,384."""
        norms = (2 * self.num_hidden_layers + 1) * self.hidden_size
        return self.num_matmul_parameters + self.vocab_size * self.hidden_size + norms

    def flops_per_token(self, sequence_length: int, convention: str = "full") -> int:
        """Training FLOPs (forward and backward) for one token of a sequence of `sequence_length` tokens.

        convention: "full" 6*N_matmul + 12*L*h*T (the one to report; TinyLlama 1.1B at T=2048: 7.314 GFLOP),
        "all_parameters" 6*N + 12*L*h*T (litgpt, llm-foundry), "causal" 6*N_matmul + 6*L*h*T.
        """
        attention = 12 * self.num_hidden_layers * self.hidden_size * sequence_length
        if convention == "full":
            return 6 * self.num_matmul_parameters + attention
        if convention == "all_parameters":
            return 6 * self.num_parameters + attention
        if convention == "causal":
            return 6 * self.num_matmul_parameters + attention // 2
        raise ValueError(f"convention={convention!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-ready dictionary."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Build from a dictionary; an unknown key is refused, naming the nearest valid one."""
        valid = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in valid:
                raise ConfigError(f"model.{key} is not a model setting", fix=nearest(key, valid))
        return cls(**values)

    def to_hf(self, *, bos_token_id: int = 1, eos_token_id: int = 2, dtype: str = "bfloat16") -> dict[str, Any]:
        """The `config.json` of a Hugging Face LlamaForCausalLM of this shape."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **self.to_dict(),
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "use_cache": True,
            "pretraining_tp": 1,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "torch_dtype": dtype,
        }

    @classmethod
    def from_hf(cls, directory: str | Path) -> ModelConfig:
        """Read the `config.json` in a Hugging Face directory; refuses what this architecture cannot express."""
        path = Path(directory) / "config.json"
        try:
            raw = json.loads(path.read_text())
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist", fix="give a Hugging Face model directory") from None
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not JSON ({error})", fix="export the model again") from None
        if raw.get("model_type") != "llama":
            raise ConfigError(f"{path}: model_type={raw.get('model_type')!r}", fix="only 'llama' models are supported")
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ConfigError(f"{path}: rope_scaling={rope!r}", fix="only unscaled RoPE is supported")
        for key, plain in (("attention_bias", False), ("mlp_bias", False), ("tie_word_embeddings", False)):
            if raw.get(key, plain) != plain:
                raise ConfigError(f"{path}: {key}={raw[key]!r}", fix=f"only {key}={plain} is supported")
        if raw.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"{path}: hidden_act={raw['hidden_act']!r}", fix="only 'silu' is supported")
        heads = raw["num_attention_heads"]
        if raw.get("head_dim") not in (None, raw["hidden_size"] // heads):
            raise ConfigError(f"{path}: head_dim={raw['head_dim']}", fix="only hidden_size / num_attention_heads")
        values = {f.name: raw[f.name] for f in dataclasses.fields(cls) if f.name in raw}
        values.setdefault("num_key_value_heads", heads)
        values.setdefault("rms_norm_eps", 1e-6)
        if "rope_theta" not in raw and "rope_theta" in rope:
            values["rope_theta"] = rope["rope_theta"]
        return cls(**values)
