"""Every field of a recipe and every setting of a DeepSpeed JSON has a kind and a range, and bad JSON is one line."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from pathlib import Path

import pytest

from tinyllama import strict_json
from tinyllama.errors import ConfigError, UserError
from train import deepspeed_json, ranges
from train.deepspeed_json import read_deepspeed
from train.plan import resolve_deepspeed
from train.recipe import Recipe, load_recipe

CONFIGS = Path(__file__).parents[2] / "ds_configs"


def leaves(kind: type, path: str = "") -> list[str]:
    """Dotted names of all fields below a dataclass; those of a list's entries without an index."""
    found = []
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name, hint = f"{path}.{field.name}".removeprefix("."), hints[field.name]
        inner = (typing.get_args(hint) or (None,))[0] if typing.get_origin(hint) is tuple else hint
        found += leaves(inner, name) if dataclasses.is_dataclass(inner) else [name]
    return found


def test_every_field_of_a_recipe_has_a_range():
    assert sorted(ranges.RECIPE) == sorted(leaves(Recipe))


def with_value(name: str, value: object) -> dict:
    """The default recipe as JSON, but for one field."""
    values = load_recipe().to_dict()
    *sections, last = name.split(".")
    section = values
    for key in sections:
        section = section[key] if key != "sources" else section[key][0]
    section[last] = value
    return values


def outside(rule: ranges.Rule) -> list[object]:
    """Values that a rule must refuse: of each other kind, beyond both ends, and no numbers."""
    odd: list[object] = [{}, [], [[1]], "", "x\ny", "\0", math.nan, math.inf, -math.inf, 1e999, -1e999, 10**400]
    if isinstance(rule, ranges.Optional):
        return [value for value in outside(rule.rule) if value is not None]
    odd.append(None)
    if isinstance(rule, ranges.Flag):
        return [*odd, 0, 1, "true"]
    if isinstance(rule, ranges.Whole):
        return [*odd, True, "1", rule.low - 1, rule.high + 1, rule.low + 0.5, -(2**63)]
    if isinstance(rule, ranges.Real):
        ends = [
            rule.low if rule.ends[0] == "(" else rule.low - 1e-9,
            rule.high if rule.ends[1] == ")" else 2 * rule.high,
        ]
        return [*odd, *ends, True, "1"]
    if isinstance(rule, ranges.Reals):
        return [*odd, 0.9, [0.9], [0.9, 0.9, 0.9], [0.9, 1.0], [-0.1, 0.9], [0.9, "0.9"], [0.9, None], [0.9, math.nan]]
    if isinstance(rule, ranges.OneOf):
        return [*odd, 0, True, "Nothing", [rule.names[0]]]
    if isinstance(rule, deepspeed_json.Texts):
        return [value for value in odd if value != []] + ["z1", [""], [None], ["z1", 1]]
    assert isinstance(rule, ranges.Text)
    return [*odd, 1, True, " ", "x" * (rule.most + 1)]


@pytest.mark.parametrize("name", sorted(ranges.RECIPE))
def test_no_field_takes_what_is_outside_of_its_range(name):
    for value in outside(ranges.RECIPE[name]):
        with pytest.raises(ConfigError, match=name.rpartition(".")[2]) as found:
            Recipe.from_dict(with_value(name, value))
        assert "\n" not in str(found.value)


def test_a_recipe_made_in_python_is_checked_too():
    recipe = load_recipe()
    for change in ({"betas": (0.9,)}, {"eps": "1e-8"}, {"grad_clip": math.nan}, {"lr": True}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            dataclasses.replace(recipe, optimizer=dataclasses.replace(recipe.optimizer, **change))


def test_whole_numbers_written_as_floats_are_exactly_those():
    recipe = load_recipe(settings=["training.tokens=1e9", "training.batch_tokens=2.097152e6", "data.seed=3407.0"])
    assert (recipe.training.tokens, recipe.training.batch_tokens, recipe.data.seed) == (10**9, 2_097_152, 3407)
    assert load_recipe(settings=["training.tokens=9e15"]).training.tokens == 9 * 10**15


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["optimizer.min_lr=1e-3"], "is not below optimizer.lr"),
        (["data.sequence_length=4096"], "max_position_embeddings=2048"),
        (["model.num_attention_heads=48"], "hidden_size=2048"),
        (["model.num_key_value_heads=5"], "not a multiple of num_key_value_heads=5"),
        (
            ["optimizer.warmup_steps=477", "training.tokens=1e9"],
            "the rate would never arrive; leave it out .null. for 47",
        ),
        (["optimizer.schedule=wsd", "optimizer.decay_frac=1e-6", "training.tokens=1e9"], "decay have a step at least"),
        (
            ["optimizer.schedule=wsd", "optimizer.decay_frac=0.8", "optimizer.warmup_steps=200", "training.tokens=1e9"],
            "begin after the warm-up",
        ),
        (
            ["checkpoint.every_steps=1000", "checkpoint.keep_every_steps=1500"],
            "not a multiple of checkpoint.every_steps",
        ),
        (['data.sources=[{"name": "a", "weight": 1}, {"name": "a", "weight": 2}]'], "each its own name"),
        (["data.sources=[]"], "at least one source"),
        (['data.sources=[{"name": "a"}]'], "data.sources.0..weight is missing; give name, weight"),
        (["data.sources=[{}]"], "data.sources.0..name is missing"),
        (["data.sources.name=1"], "sources is not a section"),
        (["data=null"], "data=None is not a JSON object"),
        (["model=5"], "model=5 is not a JSON object"),
        (["=5"], "--set =5"),
        (["optimizer..lr=1"], "optimizer. is not a recipe setting"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        load_recipe(settings=settings)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"training": {"tokens": 1e9, "tokens": 2e9}}', "key 'tokens' is given twice"),
        ('{"optimizer": {"lr": NaN}}', "NaN is not a number in JSON"),
        ('{"optimizer": {"lr": -Infinity}}', "-Infinity is not a number in JSON"),
        ('{"optimizer": {"lr": 1e999}}', "1e999 is too large"),
        ('{"training": {"tokens": 1e9,}}', "is not JSON"),
        ("[1, 2]", "is not a JSON object but a list"),
        ("null", "is not a JSON object but null"),
        ("", "is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"training": {"tokens": 1' + "0" * 5000 + "}}", "is not JSON"),
        ('{"training": null}', "training=None is not a JSON object"),
        ('{"data": {"sources": {"name": "a", "weight": 1}}}', "is not a list"),
        ('{"data": {"sources": ["a"]}}', r"sources\[0\]='a' is not a JSON object"),
        ('{"data": {"sources": [{"name": "a"}]}}', "weight"),
    ],
)
def test_odd_json_is_one_line(tmp_path, text, words):
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as found:
        load_recipe(path, ["checkpoint.keep_last=2"])
    assert "\n" not in str(found.value)


def test_bytes_that_are_not_utf8_and_folders_are_one_line_and_a_byte_order_mark_is_nothing(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_bytes(b'{"training": {"tokens": 1e9}, "note": "\xff"}')
    with pytest.raises(UserError, match="byte 39 is not UTF-8"):
        load_recipe(path)
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(tmp_path)
    path.write_bytes(b'\xef\xbb\xbf{"training": {"tokens": 1e9}, "note": "what for"}')
    recipe = load_recipe(path)
    assert (recipe.training.tokens, recipe.note) == (10**9, "what for")
    assert strict_json.parse("\ufeff[1]") == [1]


def test_an_empty_name_of_a_recipe_is_not_the_default_one():
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe("")


def test_an_open_warm_up_is_a_tenth_of_a_short_run_and_tinyllamas_of_a_long_one():
    warmups = {
        tokens: load_recipe("tinyllama_120m", [f"training.tokens={tokens}"]).warmup_steps
        for tokens in (1e9, 1e10, 1e11)
    }
    assert warmups == {1e9: 190, 1e10: 1907, 1e11: 2000}
    assert load_recipe("demo").warmup_steps == 40
    assert load_recipe(settings=["training.tokens=1"]).warmup_steps == 0


def deepspeed_leaves(rules: dict, path: str = "") -> list[tuple[str, ranges.Rule]]:
    found = []
    for name, rule in rules.items():
        here = f"{path}.{name}".removeprefix(".")
        found += deepspeed_leaves(rule, here) if isinstance(rule, dict) else [(here, rule)]
    return found


RULES = [(n, r) for n, r in deepspeed_leaves(deepspeed_json.DEEPSPEED) if not isinstance(r, deepspeed_json.Anything)]


@pytest.mark.parametrize(("name", "rule"), RULES, ids=[name for name, _ in RULES])
def test_no_setting_of_a_deepspeed_json_takes_what_is_outside_of_its_range(tmp_path, name, rule):
    path = tmp_path / "ds.json"
    inner = rule.rule if isinstance(rule, deepspeed_json.Auto) else rule
    for value in outside(inner):
        config = json.loads((CONFIGS / "zero3.json").read_text())
        *sections, last = name.split(".")
        section = config
        for key in sections:
            section = section.setdefault(key, {})
        section[last] = value
        path.write_text(json.dumps(config))
        with pytest.raises(ConfigError) as found:
            read_deepspeed(path)
        assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_micro_batch_size_per_gpu": -1}, "train_micro_batch_size_per_gpu=-1; give a whole number"),
        ({"train_micro_batch_size_per_gpu": 3}, "the recipe gives 4"),
        ({"fp16": {"enabled": True}}, "training is in bf16"),
        ({"bf16": True}, "bf16=True is not a JSON object"),
        ({"bf16": {"enable": True}}, "did you mean enabled"),
        ({"zero_optimization": {"stage": 4}}, "stage=4; valid: 1, 2, 3"),
        ({"zero_optimization": {"stage": True}}, "stage=True"),
        ({"zero_optimization": {"overlap_comm": True}}, "stage is not given"),
        ({"zero_optimization": None}, "is not a JSON object"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "this is stage 2"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "without nvme_path"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}, "does not divide 8 ranks"),
        ({"compile": {"enabled": "x"}}, "'compile.enabled' is not a setting"),
        ({"compile": {"passes": ["z2"]}}, "give a list of z1, z3, autosp, autotp, or null"),
        ({"comms_logger": {"enabled": True, "prof_ops": 5}}, "give a list of names"),
        ({"zero_optimization": {"stage": 3, "zenflow": "x"}}, "zenflow='x' is not a JSON object"),
        ({"zero_optimization": {"stage": 3, "leaf_module": {"classes": "x"}}}, "give a list of names"),
        ({"zero_optimization": {"stage": 3, "stage3_prefetch_bucket": 1}}, "did you mean stage3_prefetch_bucket_size"),
    ],
)
def test_a_deepspeed_json_that_contradicts_itself_or_the_recipe_is_refused(tmp_path, change, words):
    config = {**json.loads((CONFIGS / "zero3.json").read_text()), **change}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=words):
        resolve_deepspeed(
            read_deepspeed(tmp_path / "ds.json"), load_recipe(settings=["training.micro_batch_sequences=4"]), 8
        )


def test_the_zero_settings_are_deepspeeds_own():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    names = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert names == {*deepspeed_json.ZERO, *deepspeed_json.UNUSED_ZERO}
    for section in ("offload_param", "offload_optimizer"):
        (kind, _) = typing.get_args(DeepSpeedZeroConfig.model_fields[section].annotation)
        assert set(kind.model_fields) == set(deepspeed_json.ZERO[section])
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.runtime.zenflow.zenflow_config import ZenFlowConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig

    assert set(CompileConfig.model_fields) == set(deepspeed_json.DEEPSPEED["compile"])
    assert set(CommsLoggerConfig.model_fields) == set(deepspeed_json.DEEPSPEED["comms_logger"])
    assert set(ZenFlowConfig.model_fields) == set(deepspeed_json.ZERO["zenflow"])
    assert set(DeepSpeedZeroLeafModuleConfig.model_fields) == set(deepspeed_json.ZERO["leaf_module"])


def test_what_deepspeeds_own_examples_write_is_taken(tmp_path):
    """Whole numbers as 5e8, what is off or null; against DeepSpeed's own reading of the same section."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = {
        "stage": 3,
        "overlap_comm": None,
        "offload_param": None,
        "reduce_bucket_size": 5e8,
        "sub_group_size": 1e9,
        "stage3_prefetch_bucket_size": 5e7,
        "offload_optimizer": {"device": "cpu", "nvme_path": None, "buffer_count": 4.0},
    }
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": zero, "fp16": {"enabled": False}, "amp": {"enabled": False}}))
    found = read_deepspeed(path)
    assert set(found) == {"zero_optimization"}
    assert DeepSpeedZeroConfig(**found["zero_optimization"]) == DeepSpeedZeroConfig(**zero)
    assert type(found["zero_optimization"]["reduce_bucket_size"]) is int


def test_offloading_to_no_device_is_none(tmp_path):
    config = json.loads((CONFIGS / "zero3_offload.json").read_text())
    config["zero_optimization"]["offload_optimizer"]["device"] = "none"
    (tmp_path / "ds.json").write_text(json.dumps(config))
    assert "offload_optimizer" not in read_deepspeed(tmp_path / "ds.json")["zero_optimization"]
