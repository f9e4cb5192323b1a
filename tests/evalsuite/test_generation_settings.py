"""How a task wants text to be generated: read as transformers reads it, refused in one line, before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import random_llama

from evalsuite import backends, parity, runner, suites
from evalsuite.generation_settings import GenerationSettings, check_model, check_tasks
from tinyllama.errors import UserError

GREEDY: dict[str, Any] = {"until": ["\n"], "do_sample": False}
DRAWN: dict[str, Any] = {"do_sample": True, "temperature": 0.5}


def test_what_settings_mean():
    plain = GenerationSettings.of({"until": ["\n", "Q:"], "do_sample": False, "max_gen_toks": 5, "temperature": 0.9})
    assert (plain.most, plain.stops, plain.temperature, plain.others) == (5, ("\n", "Q:"), 0.0, {})
    assert GenerationSettings.of(None) == GenerationSettings(256, (), 0.0, {})
    assert GenerationSettings.of({"until": "x", "temperature": "0.7"}) == GenerationSettings(256, ("x",), 0.7, {})
    assert GenerationSettings.of({"max_new_tokens": 7, "max_tokens": 9}).most == 7  # lm-eval's order


@pytest.mark.parametrize(
    "idle",
    [
        {**GREEDY, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "typical_p": 0.5},
        {**GREEDY, "top_p": 7},  # out of range, and without meaning
        {**GREEDY, "num_beams": 1, "early_stopping": True, "length_penalty": 2.0},
        {**GREEDY, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_return_sequences": 1},
        {**GREEDY, "top_p": None, "repetition_penalty": None, "num_beams": None},
        {**DRAWN, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
    ],
)
def test_what_changes_nothing_is_ignored(idle):
    settings = GenerationSettings.of(idle)
    assert settings.meant == {}
    for backend in backends.BACKENDS:
        settings.check(backend)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({**GREEDY, "num_beams": 2}, "num_beams"),
        ({**GREEDY, "repetition_penalty": 1.2}, "repetition_penalty"),
        ({**GREEDY, "no_repeat_ngram_size": 3}, "no_repeat_ngram_size"),
        ({**GREEDY, "max_length": 40}, "max_length"),
        ({**DRAWN, "top_p": 0.95}, "top_p"),
        ({**DRAWN, "top_k": 50}, "top_k"),
        ({"temperature": 0.5, "min_p": 0.1}, "min_p"),
        ({**DRAWN, "seed": 4}, "seed"),
        ({**GREEDY, "unheard_of": 1}, "unheard_of"),
    ],
)
def test_what_native_cannot_do_is_refused(given, name):
    with pytest.raises(UserError, match=f"^task t: generation setting {name}=.* is not one of the native backend; "):
        check_tasks({"t": given}, "native", None)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("greedy", "generation_kwargs 'greedy' is not a mapping"),
        ({"until": None}, "until=None"),
        ({"until": [""]}, r"until=\[''\]"),
        ({"until": ["\n", 5]}, "until="),
        ({"max_gen_toks": 0}, "max_gen_toks=0; give 1 or more"),
        ({"max_gen_toks": -5}, "max_gen_toks=-5"),
        ({"max_new_tokens": "many"}, "max_new_tokens='many'"),
        ({"max_gen_toks": float("inf")}, "max_gen_toks=inf"),
        ({"max_gen_toks": True}, "max_gen_toks=True"),
        ({"temperature": -1}, "temperature=-1; give 0 or more"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": None}, "temperature=None"),
        ({"temperature": 1e-40}, "temperature=1e-40; give 0, or 1e-09 or more"),
        ({"do_sample": "false"}, "do_sample='false'; give true or false"),
        ({"do_sample": True}, "do_sample=True without a temperature above 0"),
        ({"do_sample": True, "temperature": 0}, "do_sample=True without a temperature above 0"),
        ({"max_gen_toks": 64}, "up to 64 tokens are generated, the model's context is 64"),
        ({}, "up to 256 tokens are generated, the model's context is 64"),
    ],
)
@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_what_no_backend_can_do_is_refused(backend, given, reason):
    with pytest.raises(UserError, match=f"^task t: .*{reason}") as caught:
        check_tasks({"t": given}, backend, 64)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({**DRAWN, "top_p": 2}, "top_p=2; give a number from 0 to 1"),
        ({**DRAWN, "top_k": "few"}, "top_k='few'"),
        ({**GREEDY, "num_beams": 0}, "num_beams=0; give a whole number of 1 or more"),
        ({**GREEDY, "num_beams": 2.5}, "num_beams=2.5; give a whole number"),
        ({**GREEDY, "repetition_penalty": -1.0}, "repetition_penalty=-1.0; give a number above 0"),
        ({**GREEDY, "repetition_penalty": float("inf")}, "repetition_penalty=inf"),
        ({**GREEDY, "no_repeat_ngram_size": 2.5}, "no_repeat_ngram_size=2.5; give a whole number of 0 or more"),
        ({**GREEDY, "min_length": -1}, "min_length=-1"),
        ({**DRAWN, "top_k": -1}, "top_k=-1; give a whole number of 1 or more"),
        ({**DRAWN, "top_k": 2.5}, "top_k=2.5"),
        ({**DRAWN, "typical_p": 0}, "typical_p=0; give a number above 0 and up to 1"),
        ({**DRAWN, "top_h": 0}, "top_h=0"),
        ({**GREEDY, "num_return_sequences": 3}, "num_return_sequences=3"),
        ({**GREEDY, "repetition_penaltie": 1.1}, "repetition_penaltie is unknown to --backend hf; did you mean repet"),
        ({**GREEDY, "pad_token_id": 0}, "pad_token_id is unknown to --backend hf"),
        ({**GREEDY, "max_length": 5}, "max_length=5 counts the prompt; give max_gen_toks"),
        ({**GREEDY, "stop_strings": ["x"]}, r"stop_strings=\['x'\].*: transformers refuses them \(.*tokenizer"),
        ({**GREEDY, "penalty_alpha": 0.6, "top_k": 4}, "transformers refuses them .*trust_remote_code"),
        ({**GREEDY, "num_beams": 3, "early_stopping": "x"}, "early_stopping='x', .*: transformers refuses them"),
        ({**GREEDY, "num_beams": 2, "length_penalty": "x"}, "length_penalty='x', .*: transformers refuses them"),
        ({**GREEDY, "bad_words_ids": "x"}, "bad_words_ids='x', .*: transformers refuses them"),
    ],
)
def test_what_transformers_would_fail_on_is_refused(given, reason):
    with pytest.raises(UserError, match=reason):
        check_tasks({"t": given}, "hf", None)
    check_tasks({"t": {**DRAWN, "top_p": 0.9, "top_k": 7, "num_beams": 3, "repetition_penalty": 1.3}}, "hf", None)
    check_tasks({"t": {**GREEDY, "suppress_tokens": [5, 31999], "repetition_penalty": 2}}, "hf", None)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({**DRAWN, "top_p": 0}, "top_p=0; give a number above 0 and up to 1"),
        ({**DRAWN, "temperature": 2.5}, "temperature=2.5; give a number from 0 to 2"),
        ({**GREEDY, "presence_penalty": 3}, "presence_penalty=3; give a number from -2 to 2"),
        ({**GREEDY, "min_tokens": 9, "max_gen_toks": 8}, "min_tokens=9, at most 8 are generated"),
    ],
)
def test_what_vllm_would_fail_on_is_refused(given, reason):
    with pytest.raises(UserError, match=reason):
        check_tasks({"t": given}, "vllm", None)
    check_tasks({"t": {**DRAWN, "top_p": 0.9, "top_k": -1, "min_tokens": 3}}, "vllm", None)


def test_vllm_knows_names_of_its_own():
    check_tasks({"t": {**GREEDY, "repetition_penalty": 1.3, "num_beams": 1, "typical_p": 0.4}}, "vllm", None)
    with pytest.raises(UserError, match="num_beams is unknown to --backend vllm"):
        check_tasks({"t": {**GREEDY, "num_beams": 3}}, "vllm", None)


TASK = """
task: story
dataset_path: json
dataset_kwargs: {{data_files: {{test: rows.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {settings}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(random_llama.build(tmp_path_factory.mktemp("llama") / "model", 64))


@pytest.mark.parametrize(
    ("settings", "max_length", "reason"),
    [
        ({"top_p": 0.9, "do_sample": True, "temperature": 0.5}, None, "task story: generation setting top_p=0.9"),
        ({"max_gen_toks": 0}, None, "task story: generation setting max_gen_toks=0"),
        ({"max_gen_toks": 300}, None, "task story: up to 300 tokens are generated, the model's context is 64"),
        ({"max_gen_toks": 33}, 32, "task story: up to 33 tokens are generated, the model's context is 32"),
        ({"max_gen_toks": 5}, 65, "--max-length 65 exceeds the model's context of 64"),
    ],
)
def test_it_is_refused_before_the_model_is_loaded(model, tmp_path, monkeypatch, settings, max_length, reason):
    for module, name in ((backends, "make"), (parity, "expected")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("the model is being loaded"))
    (tmp_path / "rows.jsonl").write_text('{"question": "Once", "answer": "upon"}\n')
    (tmp_path / "story.yaml").write_text(TASK.format(settings=json.dumps(settings)))
    (tmp_path / "own.yaml").write_text("name: own\ntasks: [{task: story.yaml}]\n")
    chosen, own = suites.choose(str(tmp_path / "own.yaml"))
    choice = backends.choose(model, "native", "float32", None, max_length)
    request = runner.Request(choice, chosen, None, None, tmp_path / "out", own_suites=tuple(own))
    with pytest.raises(UserError, match=reason):
        runner.evaluate(request, lambda *_: None)
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_model_s_own_settings_are_those_of_transformers_or_refused(tmp_path):
    path = tmp_path / "generation_config.json"
    check_model(tmp_path)
    path.write_text(
        '{"eos_token_id": [2, 7], "do_sample": true, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.0}'
    )
    check_model(tmp_path)
    path.write_text('{"eos_token_id": 2, "repetition_penalty": 1.1}')
    with pytest.raises(
        UserError, match=r"generation_config\.json: generation setting repetition_penalty=1\.1 is not one"
    ):
        check_model(tmp_path)


@pytest.mark.parametrize("value", [0, -5])
def test_a_context_of_no_tokens_is_refused(model, value):
    with pytest.raises(UserError, match=f"--max-length {value}; give 1 or more tokens"):
        backends.choose(model, None, None, None, value)


def test_every_stock_task_of_lm_eval_has_settings_with_a_meaning():
    """No task that lm-eval has is refused for what only looks wrong."""
    import lm_eval.tasks
    import yaml

    class Loader(yaml.CSafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    found = 0
    for path in sorted(Path(lm_eval.tasks.__file__).parent.rglob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        if "\ngeneration_kwargs:" not in text:
            continue
        given = yaml.load(text, Loader).get("generation_kwargs")
        if isinstance(given, dict) and given:
            GenerationSettings.of(given).check("hf")
            found += 1
    assert found > 100
