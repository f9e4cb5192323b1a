"""The shape of a Llama, and the arithmetic that follows from it. Torch-free.

Field names are Hugging Face's, so that a `config.json` of an export is this object and a few constants. Parameter counts
and FLOPs per token are exact functions of the shape; the three FLOPs conventions in use are all here, named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tinyllama.errors import ConfigError, nearest
from tinyllama.model.stored import read_config


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
        where = Path(directory) / "config.json"
        raw = read_config(Path(directory))
        if raw["model_type"] != "llama":
            raise ConfigError(f"{where}: model_type={raw['model_type']!r}", fix="only 'llama' models are supported")
        check_fields(raw, where)
        for key, plain in PLAIN.items():
            if raw.get(key, plain) != plain:
                raise ConfigError(f"{where}: {key}={raw[key]!r}", fix=f"only {key}={plain!r} is supported")
        if raw.get("head_dim") not in (None, raw["hidden_size"] // raw["num_attention_heads"]):
            raise ConfigError(f"{where}: head_dim={raw['head_dim']}", fix="only hidden_size / num_attention_heads")
        values = {f.name: raw[f.name] for f in dataclasses.fields(cls) if raw.get(f.name) is not None}
        values.setdefault("num_key_value_heads", raw["num_attention_heads"])
        values.setdefault("rms_norm_eps", 1e-6)
        theta = _rope_theta(raw, where)
        try:
            return cls(**{**values, "rope_theta": theta})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error.what}", fix="use the configuration of the weights") from None


Check = Callable[[Any], bool]


def _whole(low: int, high: int = 2**31 - 1) -> Check:
    return lambda value: type(value) is int and low <= value <= high


def _number(low: float, high: float) -> Check:
    """Not NaN, no truth value; the bounds belong to it."""
    return lambda value: type(value) in (int, float) and low <= value <= high


def _real(low: float, high: float) -> Check:
    """As transformers, which refuses a whole number here."""
    return lambda value: type(value) is float and low <= value <= high


def _ids(value: Any) -> bool:
    return value is None or type(value) is int or (isinstance(value, list) and all(type(v) is int for v in value))


def _full_attention(value: Any) -> bool:
    return isinstance(value, list) and all(kind == "full_attention" for kind in value)


def _truth(value: Any) -> bool:
    return type(value) is bool


TINY = 1e-30  # the smallest positive number where 0 means nothing; far from what float32 can hold
# What the fields of a Llama's config.json may hold, in words and as a check. The first five have no default: transformers'
# is another shape than ours.
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
FIELDS: dict[str, tuple[str, Check]] = {
    **{name: ("a whole number, 1 or more", _whole(1)) for name in (*REQUIRED, "max_position_embeddings")},
    "num_key_value_heads": ("a whole number, 1 or more", lambda v: v is None or _whole(1)(v)),
    "head_dim": ("a whole number, 1 or more", lambda v: v is None or _whole(1)(v)),
    "rms_norm_eps": ("a number with a point, from 1e-30 to 1", _real(TINY, 1)),
    "rope_theta": ("a number above 0", lambda v: v is None or _number(TINY, 1e30)(v)),
    "partial_rotary_factor": ("1", lambda v: v is None or _number(1, 1)(v)),
    "initializer_range": ("a number with a point, above 0, up to 1", _real(TINY, 1)),
    "attention_dropout": ("a number from 0 to 1", lambda v: v is None or _number(0, 1)(v)),
    "attention_bias": ("true or false", _truth),
    "mlp_bias": ("true or false", _truth),
    "tie_word_embeddings": ("true or false", _truth),
    "use_cache": ("true or false", _truth),
    "is_causal": ("true", lambda v: v is True),
    "per_layer_config": ("null", lambda v: v is None),
    "sliding_window": ("null", lambda v: v is None),
    "layer_types": ("null, or full_attention for each layer", lambda v: v is None or _full_attention(v)),
    "attn_implementation": ("eager, sdpa or null", lambda v: v in (None, "eager", "sdpa")),
    "hidden_act": ("a name", lambda v: isinstance(v, str)),
    "rope_scaling": ("an object or null", lambda v: v is None or isinstance(v, dict)),
    "rope_parameters": ("an object or null", lambda v: v is None or isinstance(v, dict)),
    "pretraining_tp": ("a whole number, 1 or more", lambda v: v is None or _whole(1)(v)),
    "bos_token_id": ("a token id or null", lambda v: v is None or type(v) is int),
    "pad_token_id": ("a token id or null", lambda v: v is None or type(v) is int),
    "eos_token_id": ("a token id, a list of them, or null", _ids),
}
# The only value that this architecture can express.
PLAIN = {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "hidden_act": "silu"}


HEAD = "lm_head.weight"
# Decoders whose tensors are named as a Llama's: enough to see that a config.json is another model's.
LLAMA_LIKE = ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "olmo", "olmo2", "granite")


def check_fields(raw: dict[str, Any], where: Path) -> None:
    """Refuse a Llama's config.json that misses a part of the shape, or has a field that is not what it must be."""
    for name in REQUIRED:
        if name not in raw:
            raise ConfigError(f"{where} has no {name}", fix="use the configuration that the weights were trained with")
    for name, (words, allowed) in FIELDS.items():
        if name in raw and not allowed(raw[name]):
            raise ConfigError(f"{where}: {name}={_short(raw[name])} is not {words}", fix="correct it")
    _rope(raw, where)
    padding = raw.get("pad_token_id")
    if padding is not None and not (type(padding) is int and -raw["vocab_size"] <= padding < raw["vocab_size"]):
        raise ConfigError(
            f"{where}: pad_token_id={_short(padding)} is no token of {raw['vocab_size']}", fix="correct it"
        )
    kinds = raw.get("layer_types")
    if kinds is not None and len(kinds) != raw["num_hidden_layers"]:
        raise ConfigError(f"{where}: {len(kinds)} layer_types, {raw['num_hidden_layers']} layers", fix="correct it")
    named = raw.get("architectures")
    if named and "LlamaForCausalLM" not in named:
        raise ConfigError(f"{where}: architectures={named!r}", fix="only LlamaForCausalLM is supported")
    heads, kv_heads = raw["num_attention_heads"], raw.get("num_key_value_heads") or raw["num_attention_heads"]
    if raw["hidden_size"] % heads or heads % kv_heads:
        raise ConfigError(
            f"{where}: hidden_size={raw['hidden_size']}, num_attention_heads={heads} and num_key_value_heads={kv_heads} "
            "do not divide one another",
            fix="use the configuration that the weights were trained with",
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _rope(raw: dict[str, Any], where: Path) -> tuple[dict[str, Any], list[Any]]:
    """RoPE's parameters and its base, as often as it is there: at the root, in `rope_parameters` and in `rope_scaling`, as
    older files call it. Where they differ, some programs take the first and transformers the second: refused.
    """
    scaling, parameters = raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}
    rope = scaling or parameters
    places = (raw, scaling, parameters)
    if scaling and parameters:
        differ = _without_theta(scaling) != _without_theta(parameters)
        # transformers takes the first, and the base from there or the root.
        if differ or ("rope_theta" in parameters and not any("rope_theta" in place for place in places[:2])):
            raise ConfigError(
                f"{where}: rope_scaling and rope_parameters differ: which one?", fix="leave one of them out"
            )
    words, allowed = FIELDS["rope_theta"]
    found = [place["rope_theta"] for place in places if "rope_theta" in place]
    for theta in found:
        if theta is None or not allowed(theta):
            raise ConfigError(f"{where}: rope_theta={_short(theta)} is not {words}", fix="correct it")
    if len(set(found)) > 1:
        one, other = list(dict.fromkeys(found))[:2]
        raise ConfigError(
            f"{where}: rope_theta={one} and rope_parameters.rope_theta={other}: which one?",
            fix="make them the same; transformers takes the second",
        )
    return rope, found


def _without_theta(rope: dict[str, Any]) -> dict[str, Any]:
    """RoPE's other parameters, by their newer names."""
    return {"rope_type" if key == "type" else key: value for key, value in rope.items() if key != "rope_theta"}


def _rope_theta(raw: dict[str, Any], where: Path) -> float:
    """The base of RoPE, which must not be scaled."""
    rope, found = _rope(raw, where)
    kinds = [rope[key] for key in ("rope_type", "type") if key in rope]
    if any(kind != "default" for kind in kinds):
        raise ConfigError(f"{where}: rope_scaling={_short(rope)}", fix="only unscaled RoPE is supported")
    for key, value in rope.items():
        if key == "partial_rotary_factor" and type(value) in (int, float) and value == 1:
            continue
        if key not in ("rope_type", "type", "rope_theta"):
            raise ConfigError(
                f"{where}: rope_parameters has {key}={_short(value)}", fix="only unscaled RoPE is supported"
            )
    return float(found[0]) if found else ModelConfig.rope_theta


def llama_tensors(raw: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Hugging Face's name and shape of every tensor of a Llama, from a config.json that `check_fields` has seen; with the
    options that ours does not have (biases, another head_dim). Tied heads may be stored or not, and are left out.
    """
    hidden, inner, heads = raw["hidden_size"], raw["intermediate_size"], raw["num_attention_heads"]
    width = raw.get("head_dim") or hidden // heads
    q, kv = heads * width, (raw.get("num_key_value_heads") or heads) * width
    attention, mlp = bool(raw.get("attention_bias")), bool(raw.get("mlp_bias"))
    matrices = (
        ("self_attn.q_proj", q, hidden, attention),
        ("self_attn.k_proj", kv, hidden, attention),
        ("self_attn.v_proj", kv, hidden, attention),
        ("self_attn.o_proj", hidden, q, attention),
        ("mlp.gate_proj", inner, hidden, mlp),
        ("mlp.up_proj", inner, hidden, mlp),
        ("mlp.down_proj", hidden, inner, mlp),
    )
    yield "model.embed_tokens.weight", (raw["vocab_size"], hidden)
    for layer in range(raw["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, rows, columns, bias in matrices:
            yield f"{prefix}.{name}.weight", (rows, columns)
            if bias:
                yield f"{prefix}.{name}.bias", (rows,)
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not raw.get("tie_word_embeddings"):
        yield HEAD, (raw["vocab_size"], hidden)


def decoder_tensors(raw: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Some tensors of a model of LLAMA_LIKE, as far as its config.json says their shapes."""
    if not all(_whole(1)(raw.get(name)) for name in REQUIRED):
        return
    yield "model.embed_tokens.weight", (raw["vocab_size"], raw["hidden_size"])
    for layer in range(raw["num_hidden_layers"]):
        yield f"model.layers.{layer}.mlp.down_proj.weight", (raw["hidden_size"], raw["intermediate_size"])
