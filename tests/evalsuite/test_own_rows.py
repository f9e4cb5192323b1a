"""Rows of users' own tasks: each mistake is one line with file, line and field, told before there is a model."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from evalsuite import definitions, earlier_results, rows, suites, task_config, task_loading, yaml_files
from tinyllama.errors import UserError

GOOD = [{"q": "x", "a": 0}, {"q": "y", "a": 1}]
TASK: dict[str, Any] = {
    "task": "own", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
    "doc_to_text": "{{q}}", "doc_to_choice": ["yes", "no"], "doc_to_target": "a",
}  # fmt: skip
SUFFIX = {"json": "jsonl", "csv": "csv", "parquet": "parquet", "text": "txt"}


def jsonl(*found: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in found).encode()


def parquet(found: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(found), sink)
    return sink.getvalue()


def load(folder: Path, content: bytes, form: str = "json", train: bytes | None = None, **changes: Any) -> Any:
    """lm-eval's task of these rows, after every check."""
    files = {"test": f"test.{SUFFIX[form]}"}
    (folder / files["test"]).write_bytes(content)
    if train is not None:
        files["train"] = f"train.{SUFFIX[form]}"
        (folder / files["train"]).write_bytes(train)
        changes = {"training_split": "train", **changes}
    task = TASK | {"dataset_path": form, "dataset_kwargs": {"data_files": files}} | changes
    text = yaml.safe_dump({key: value for key, value in task.items() if value is not None})
    (folder / "own.yaml").write_text(text.replace("'!function utils.f'", "!function utils.f"))
    benchmark = suites.Benchmark("own", "own", "", changes.get("num_fewshot"), str(folder / "own.yaml"), own=True)
    (folder / "scratch").mkdir()
    return task_loading.load(definitions.prepare(benchmark, None, folder / "scratch")).tasks["own"]


def told(folder: Path, *arguments: Any, **changes: Any) -> str:
    with pytest.raises(UserError) as raised:
        load(folder, *arguments, **changes)
    assert len(str(raised.value).splitlines()) == 1
    return str(raised.value).replace(f"{folder}/", "")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "test.jsonl has no rows"),
        (b"\n \n", "test.jsonl has no rows"),
        (jsonl(*GOOD)[:-8], "test.jsonl:2: no JSON object (Expecting"),
        (jsonl(GOOD[0]) + b'{"q": "caf\xe9", "a": 0}\n', "test.jsonl:2: not UTF-8 (byte 0xe9)"),
        (jsonl(GOOD[0], {"q": "\ud800", "a": 0}), "test.jsonl:2: no JSON object (field q: \\ud800 is no character)"),
        (jsonl(*GOOD, [1]), "test.jsonl:3: no JSON object (not an object)"),
        (jsonl(*GOOD, "x"), "test.jsonl:3: no JSON object (not an object)"),
        (jsonl(*GOOD, {"q": 5, "a": 0}), "test.jsonl:3: field q is a whole number (5), in "),
        (jsonl(*GOOD, {"q": "z", "a": "1"}), "test.jsonl:3: field a is text ('1'), in "),
        (jsonl(*GOOD, {"q": "z", "a": True}), "test.jsonl:3: field a is true or false (True), in "),
        (jsonl(*GOOD, {"q": "z", "a": 0, "more": float("nan")}), "test.jsonl:3: no JSON object (NaN is no JSON)"),
        (jsonl(*GOOD, {"q": "z", "a": 2**70}), "test.jsonl:3: field a is beyond 64 bits"),
        (jsonl({"q": "z", "a": 0.5}, {"q": "x", "a": 2**70}), "test.jsonl:2: field a is beyond 64 bits"),
        (jsonl({"q": 2**60, "a": 0}, {"q": 0.5, "a": 0}), "test.jsonl:1: field q is a whole number beyond 2^53, in "),
        (b'{"q": "x", "a": 0, "a": 1}\n', "test.jsonl:1: no JSON object (field 'a' is there twice)"),
        (b'{"q": ' + b"[" * 9999 + b"]" * 9999 + b"}", "test.jsonl:1: no JSON object (nested too deeply)"),
        (jsonl(*GOOD, {"a": 1}), "test.jsonl:3: doc_to_text ('{{q}}'): field q is empty or missing"),
        (jsonl(*GOOD, {"q": None, "a": 1}), "test.jsonl:3: doc_to_text ('{{q}}'): field q is empty or missing"),
        (jsonl(*GOOD, {"q": " ", "a": 1}), "test.jsonl:3: doc_to_text ('{{q}}'): the text is empty"),
        (jsonl({"q": "7", "a": 0}), "test.jsonl:1: doc_to_text ('{{q}}'): the text is the number 7"),
        (jsonl(*GOOD, {"q": "1", "a": 0}), "test.jsonl:3: doc_to_text ('{{q}}'): 1 is a number, that of the first"),
        (jsonl(*GOOD, {"q": "z", "a": None}), "test.jsonl:3: doc_to_target ('a'): the label is empty or missing"),
        (jsonl(*GOOD, {"q": "z", "a": 2}), "test.jsonl:3: doc_to_target ('a'): label 2, and the choices are 0 to 1"),
        (jsonl({"q": "z", "a": 2}), "test.jsonl:1: doc_to_target ('a'): label 2, and the choices are 0 to 1"),
        (jsonl(*GOOD, {"q": "z", "a": -1}), "test.jsonl:3: doc_to_target ('a'): label -1"),
        (jsonl({"q": "x", "a": 0.5}), "test.jsonl:1: doc_to_target ('a'): label 0.5 is not a choice's number"),
        (jsonl({"q": "x", "a": "Yes"}), "test.jsonl:1: doc_to_target ('a'): label 'Yes' is none of the choices"),
        (jsonl({"q": "x", "a": [0]}, {"q": "y", "a": [0, 2]}), "test.jsonl:2: doc_to_target ('a'): label 2"),
        (jsonl({"q": "x", "a": []}), "test.jsonl:1: doc_to_target ('a'): no label"),
    ],
)  # fmt: skip
def test_rows_of_json_that_mean_nothing(tmp_path, content, words):
    assert words in told(tmp_path, content)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ([], "[] is no choice: give two or more"),
        (["a"], "['a'] is no choice: give two or more"),
        (["a", ""], "choice 1 is empty"),
        (["a", " "], "choice 1 is empty"),
        ([1, 2], "choice 0, 1, is not text, put it in quotes"),
        (["a", None], "choice 1, None, is not text"),
        ("ab", "'ab' is not a list"),
        (None, "None is not a list"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_choices_that_are_none(tmp_path, choices, words, first):
    """Also of the first row, with which lm-eval fails while it builds the task."""
    good = [] if first or not isinstance(choices, list) or 1 in choices else [{"q": "x", "c": ["a", "b"], "a": 0}]
    found = told(tmp_path, jsonl(*good, {"q": "y", "c": choices, "a": 0}), doc_to_choice="c")
    assert f"test.jsonl:{len(good) + 1}: doc_to_choice ('c'): {words}" in found


@pytest.mark.parametrize(
    ("form", "content", "words"),
    [
        ("csv", b"", "test.csv has no rows"),
        ("csv", b"q,a\n", "test.csv has no rows"),
        ("csv", b"q,a\nx,0\ncaf\xe9,1\n", "test.csv:3: not UTF-8 (byte 0xe9)"),
        ("csv", b"q,a\nx,0\ny\n", "test.csv:3: 1 fields, the header has 2"),
        ("csv", b"q,a\nx,0\ny,1,2\n", "test.csv:3: 3 fields, the header has 2"),
        ("csv", b'q,a\nx,0\n"y,1\n', "test.csv:3: no CSV (unexpected end of data)"),
        ("csv", b"q,q\nx,0\n", "test.csv:1: field 'q' is there twice"),
        ("csv", b"q,\nx,0\n", "test.csv:1: field '' has no name"),
        ("csv", b",\nx,0\n", "test.csv:1: field '' has no name"),
        ("csv", b'q,a\n"two\nlines",0\ny,\n', "test.csv:4: doc_to_target ('a'): the label is empty or missing"),
        ("csv", b"q,a\nx,0\ny,2\n", "test.csv:3: doc_to_target ('a'): label 2"),
        ("csv", b"q,a\nx,true\n", "test.csv:2: doc_to_target ('a'): label 'true' is none of the choices"),
        ("csv", b"q,a\nx,00\n", "test.csv:2: doc_to_target ('a'): label '00' is none of the choices"),
        ("parquet", parquet(GOOD)[:-9], "test.parquet is no whole Parquet file"),
        ("parquet", b"PAR1", "test.parquet is no whole Parquet file"),
        ("parquet", parquet(GOOD)[:0], "test.parquet is no whole Parquet file"),
        ("parquet", parquet([*GOOD, {"q": None, "a": 0}]), "test.parquet: row 3: doc_to_text ('{{q}}'): field q is empty"),
        ("parquet", parquet([*GOOD, {"q": "z", "a": 2}]), "test.parquet: row 3: doc_to_target ('a'): label 2"),
        ("parquet", parquet([{"q": b"\xff", "a": 0}]), "test.parquet: row 1: doc_to_text ('{{q}}'): ValueError"),
    ],
)  # fmt: skip
def test_rows_of_other_forms_that_mean_nothing(tmp_path, form, content, words):
    assert words in told(tmp_path, content, form)


def test_lines_of_text(tmp_path):
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_choice": None}
    assert "test.txt:2: doc_to_target" in told(tmp_path, b"a\n\nb\n", "text", doc_to_target="{{text}}", **rolling)


@pytest.mark.parametrize(
    ("form", "content", "kept"),
    [
        ("json", jsonl({"q": "2020-01-01", "a": 0}), "2020-01-01"),  # other readers make a time of it
        ("json", b"\xef\xbb\xbf" + jsonl({"q": "\U0001f600", "a": 0}), "\U0001f600"),
        ("json", json.dumps([{"q": "x", "a": 0}], indent=2).encode(), "x"),
        ("csv", b"q,a\nNA,0\n", "NA"),  # and nothing of these
        ("csv", b"q,a\nNone,0\n", "None"),
        ("csv", b'\xef\xbb\xbfq,a\r\n"007, ""x""",0\r\n', '007, "x"'),
        ("csv", b",q,a\n0,x,0\n", "x"),  # as pandas writes it, with its index
        ("parquet", parquet([{"q": "x", "a": 0}]), "x"),
    ],
)  # fmt: skip
def test_what_is_evaluated_is_what_stands_in_the_file(tmp_path, form, content, kept):
    task = load(tmp_path, content, form)
    assert task.doc_to_text(task.task_docs[0]) == kept
    assert task.doc_to_target(task.task_docs[0]) == 0


def test_files_may_be_packed_and_columns_keep_their_order(tmp_path):
    found = [{"q": "x", "z": {"text": ["b"], "label": [], "a": {}}, "a": 0, "n": None}, {"q": "y", "a": 1}]
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(jsonl(*found)))
    task = load(tmp_path, b"", dataset_kwargs={"data_files": {"test": "rows.jsonl.gz"}})
    assert [json.dumps(doc) for doc in task.task_docs] == [
        json.dumps(found[0]), json.dumps({"q": "y", "z": None, "a": 1, "n": None}),
    ]  # fmt: skip
    table = rows.read(tmp_path / "rows.jsonl.gz", "json", {})
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(jsonl(*found))[:-9])
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz cannot be read"):
        rows.read(tmp_path / "rows.jsonl.gz", "json", {})
    assert table.rows == found


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "device", "huge"])
def test_what_is_no_file_of_rows_is_not_read(tmp_path, kind):
    path = tmp_path / "rows.jsonl"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "huge":
        with open(path, "wb") as stream:
            stream.truncate(rows.MOST_BYTES + 1)
    words = {"missing": "cannot be read (No such file", "folder": "is a folder", "huge": "has more than 1 GiB"}
    found = told(tmp_path, b"", dataset_kwargs={"data_files": {"test": "rows.jsonl"}})
    assert words.get(kind, "is no regular file") in found


GENERATED: dict[str, Any] = {
    "output_type": "generate_until", "doc_to_choice": None, "generation_kwargs": {"until": ["\n"]},
    "metric_list": [{"metric": "exact_match"}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("answers", "changes", "words"),
    [
        ([[], ["b"]], {}, "test.jsonl:1: doc_to_target ('a'): the list of answers is empty"),
        ([["b"], []], {}, "test.jsonl:2: doc_to_target ('a'): the list of answers is empty"),
        ([[5], [2]], {}, "test.jsonl:1: doc_to_target ('a'): answer 5 is not text, and no text is equal to it"),
        (["[1, 2]"], {"doc_to_target": "{{a}}"}, "doc_to_target ('{{a}}'): answer 1 is not text"),
        (["x", "['y']"], {"doc_to_target": "{{a}}"}, "test.jsonl:2: doc_to_target ('{{a}}'): ['y'] is a list, that of"),
        ([["b"]], {"metric_list": [{"metric": "bleu"}]}, "doc_to_target ('a'): a list of answers, and bleu is for one"),
        ([5, 2.5], {}, "test.jsonl:1: doc_to_target ('a'): field a: 5 is asked as 5.0, for other rows have fractions"),
    ],
)  # fmt: skip
def test_answers_that_no_text_equals(tmp_path, answers, changes, words):
    """lm-eval gives 0 to whatever the model writes, or fails after it has written."""
    content = jsonl(*({"q": f"question {n}", "a": answer} for n, answer in enumerate(answers)))
    assert words in told(tmp_path, content, **{**GENERATED, **changes})


@pytest.mark.parametrize("answers", [[["4", "four"], ["1"]], ["[1, 2]", "007"], [5, 9007199254740993], [0.5, 2.0]])
def test_what_equals_its_answer_is_right(tmp_path, answers):
    content = jsonl(*({"q": f"question {n}", "a": answer} for n, answer in enumerate(answers)))
    task = load(tmp_path, content, **GENERATED)
    for doc, answer in zip(task.task_docs, answers, strict=True):
        written = answer[-1] if isinstance(answer, list) else str(answer)
        assert task.process_results(doc, [written]) == {"exact_match": 1.0}


@pytest.mark.parametrize("form", ["json", "csv"])
def test_a_label_that_is_true_is_no_other_choice_than_true(tmp_path, form):
    """True is the number 1, and the second choice: "False", where "True" is the first."""
    content = b"q,a\nx,True\n" if form == "csv" else jsonl({"q": "x", "a": True})
    for number, choices in enumerate((["true", "false"], ["False", "True"], ["no", "yes"])):
        (folder := tmp_path / str(number)).mkdir()
        if number == 0:
            assert "label True is choice 1, 'false'" in told(folder, content, form, doc_to_choice=choices)
        else:
            assert load(folder, content, form, doc_to_choice=choices)
    (tmp_path / "text").mkdir()
    task = load(tmp_path / "text", b"q,a\nx,true\n", "csv", doc_to_choice=["true", "false"])
    assert task.doc_to_target(task.task_docs[0]) == "true"


def test_a_label_of_the_second_of_two_equal_choices(tmp_path):
    """lm-eval takes the first of equally likely ones."""
    found = [{"q": "x", "c": ["a", "a", "b"], "a": label} for label in (0, 2, 1)]
    assert "test.jsonl:3: doc_to_target ('a'): label 1, and choice 0 is the same text" in told(
        tmp_path, jsonl(*found), doc_to_choice="{{c}}"
    )


METRIC = """
def f(items):
    return sum(wanted == written for wanted, written in items) / len(items)
"""
SCORE = """
def f(doc, results):
    return {"acc": 1.0}
"""
FILTER = f"""{SCORE}
from lm_eval.api.filter import Filter
from lm_eval.api.registry import register_filter

@register_filter("without_brackets")
class Stripped(Filter):
    def apply(self, resps, docs):
        return [[text.strip("<>") for text in texts] for texts in resps]
"""


@pytest.mark.parametrize(
    "changes",
    [
        {"metric_list": [{"metric": "f1", "aggregation": "!function utils.f"}], **GENERATED, "doc_to_target": "{{a}}"},
        {"metric_list": [{"metric": "likelihood", "aggregation": "!function utils.f"}]},
        {"metric_list": [{"metric": "acc", "hf_evaluate": True}], "process_results": "!function utils.f"},
        {"process_results": "!function utils.f", "metric_list": [{"metric": "acc"}]},
        {"filter_list": [{"name": "f", "filter": [{"function": "without_brackets"}, {"function": "take_first"}]}],
         "process_results": "!function utils.f", **GENERATED, "metric_list": [{"metric": "acc"}]},
    ],
)  # fmt: skip
def test_definitions_as_lm_evals_own_tasks_have_them(tmp_path, changes):
    """masakhaner's metric, e2lmc's, c4's default aggregation, acpbench's filter that its module registers."""
    (tmp_path / "utils.py").write_text(
        FILTER if "filter_list" in changes else SCORE if "process_results" in changes else METRIC
    )
    assert load(tmp_path, jsonl(*GOOD), **changes).has_test_docs()


def test_a_task_that_is_a_class_has_fields_of_its_own(tmp_path):
    text = TASK | {"recipe": "card=x", "group": "scrolls"}
    task_config.check(text | {"class": yaml_files.Function("task.Unitxt")}, "own.yaml")
    with pytest.raises(UserError, match="unknown field 'recipe'"):
        task_config.check(text | {"group": None}, "own.yaml")


SIX = jsonl(*({"q": f"question {n}", "a": n % 2} for n in range(6)))


@pytest.mark.parametrize(
    ("content", "train", "changes", "words"),
    [
        (SIX, None, {}, "task own: shots from test, which is asked: an item could be its own shot; add fewshot_split: test"),
        (SIX, None, {"test_split": None, "validation_split": "test", "fewshot_split": "test"}, "could be its own shot"),
        (SIX, SIX, {}, "test.jsonl:1: the item is also the shot train.jsonl:1"),
        (SIX, jsonl({"q": "t", "a": 0}, {"q": "u", "a": 0}, {"id": 9, "q": "question 4", "a": 1}), {},
         "test.jsonl:5: the item is also the shot train.jsonl:3"),
        (SIX, jsonl({"q": "t", "a": 0}, {"q": "u", "a": 0}, {"id": 9, "q": "t", "a": 0}), {},
         "train.jsonl:3: the same as train.jsonl:1, and both are shots"),
        (SIX + jsonl({"q": "question 0", "a": 0}), None, {"fewshot_split": "test"},
         "test.jsonl:7: the same as test.jsonl:1, and both are shots"),
        (SIX, jsonl({"q": "t", "a": 0}), {}, "train.jsonl: 1 rows, and 2 shots are asked for"),
        (jsonl(*GOOD), None, {"fewshot_split": "test"}, "test.jsonl: 2 rows, and 2 shots are asked for besides the item"),
        (SIX, jsonl({"q": "t", "a": 0}, {"q": "u", "a": 0}, {"q": "v", "a": 2}), {},
         "train.jsonl:3: doc_to_target ('a'): label 2"),
        (SIX, jsonl({"q": "t", "a": "0"}), {}, "train.jsonl:1: field a is text ('0'), in "),
        (SIX, None, {"fewshot_config": {"samples": [{"q": "t", "a": 0}, {"q": "u", "a": 4}]}},
         "task own: fewshot_config.samples, 2: doc_to_target ('a'): label 4"),
    ],
)  # fmt: skip
def test_shots_that_are_none(tmp_path, content, train, changes, words):
    assert words in told(tmp_path, content, "json", train, num_fewshot=2, **changes)


@pytest.mark.parametrize(
    ("train", "changes"),
    [
        (jsonl({"q": "t", "a": 0}, {"q": "u", "a": 1}), {}),
        (None, {"fewshot_split": "test"}),
        (None, {"fewshot_split": "test", "fewshot_config": {"sampler": "first_n"}}),
        (None, {"fewshot_config": {"samples": [{"q": "t", "a": 0}, {"q": "u", "a": 1}]}}),
    ],
)
def test_no_item_is_among_its_own_shots(tmp_path, train, changes):
    """What passes the checks, as lm-eval asks it."""
    task = load(tmp_path, SIX, "json", train, num_fewshot=2, doc_to_text="<{{q}}>", **changes)
    task.set_fewshot_seed(1234)
    for doc in task.task_docs:
        prompt = task.fewshot_context(doc, num_fewshot=2)
        assert prompt.count("<") == 3
        assert prompt.count(f"<{doc['q']}>") == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"doc_to_text": "{{q.x.y}}"}, "test.jsonl:1: doc_to_text ('{{q.x.y}}'): UndefinedError"),
        ({"doc_to_text": "{{gone}}"}, "test.jsonl:1: doc_to_text ('{{gone}}'): field gone is empty or missing"),
        ({"doc_to_text": "{{q"}, "test.jsonl:1: doc_to_text ('{{q'): TemplateSyntaxError"),
        ({"doc_to_text": "{{1 / a}}"}, "test.jsonl:1: doc_to_text ('{{1 / a}}'): ZeroDivisionError"),
        ({"doc_to_choice": [True, False]}, "doc_to_choice: choice 0, True, is not text, put it in quotes"),
        ({"doc_to_target": "{{['no', 'yes'][a]}}?"}, "label 'no?' is none of the choices"),
        ({"doc_to_choice": ["1", "0"], "doc_to_target": "{{'%d' % 0}}"}, "label 0 is a choice's number and another"),
        ({"process_docs": "!function utils.f"}, "own.yaml cannot be built (KeyError in utils.py:2: 'gone')"),
        ({"description": "{{gone}}"}, "test.jsonl:1: description: field gone is empty or missing"),
        ({"metric_list": [{"metric": "f1"}], "doc_to_choice": ["a", "b", "c"]}, "3 choices: f1 is for two"),
    ],
)
def test_templates_and_functions_that_fail(tmp_path, changes, words):
    (tmp_path / "utils.py").write_text("def f(docs):\n    return docs.map(lambda doc: {'q': doc['gone']})\n")
    assert words in told(tmp_path, jsonl(*GOOD), **changes)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise SystemExit(0)", "own.yaml cannot be built (SystemExit in utils.py:1: 0)"),
        ("def f(docs:", "own.yaml cannot be built (SyntaxError"),
        ("x = 1", "own.yaml cannot be built (AttributeError: Module"),
        ("def f(docs):\n    return docs.filter(lambda doc: False)", "test.jsonl: process_docs leaves no rows"),
        (
            "def f(docs):\n    return docs.map(lambda doc: {'a': 7})",
            "test.jsonl: item 1 after process_docs: doc_to_target",
        ),
    ],
)
def test_modules_that_fail(tmp_path, body, words):
    (tmp_path / "utils.py").write_text(body)
    assert words in told(tmp_path, jsonl(*GOOD), process_docs="!function utils.f")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_fewshots": 2}, "unknown field 'num_fewshots'; did you mean num_fewshot?"),
        ({"output_type": "multiple_choices"}, "output_type 'multiple_choices'; did you mean multiple_choice?"),
        ({"repeats": 0}, "repeats 0; give 1 or more"),
        ({"repeats": True}, "repeats True is not a whole number"),
        ({"num_fewshot": -1}, "num_fewshot -1; give 0 or more"),
        ({"target_delimiter": 3}, "target_delimiter 3 is not text"),
        ({"test_split": "tset"}, "test_split 'tset' is none of data_files; did you mean test?"),
        ({"fewshot_split": "train"}, "fewshot_split 'train' is none of data_files"),
        ({"test_split": None}, "neither test_split nor validation_split is there"),
        ({"dataset_kwargs": {"data_files": {"test": "test.jsonl"}, "streaming": True}}, "dataset_kwargs.streaming"),
        ({"dataset_kwargs": {"data_files": "test.jsonl"}}, "dataset_kwargs.data_files names no files"),
        ({"dataset_path": "./rows"}, "dataset_path './rows' is a place on this machine"),
        ({"dataset_path": "evalsuite"}, "dataset_path 'evalsuite' is a place on this machine"),
        ({"metric_list": []}, "metric_list is empty"),
        ({"metric_list": [{"metric": "accc"}]}, "metric 1: 'accc' is no metric of multiple_choice tasks; did you mean acc"),
        ({"metric_list": [{"metric": "bleu"}]}, "metric 1: 'bleu' is no metric of multiple_choice tasks"),
        ({"metric_list": [{"metric": "acc"}, {"metric": "acc"}]}, "metric 2: acc is there twice"),
        ({"metric_list": [{"metric": "acc", "aggregation": "sum"}]}, "metric 1: acc has no aggregation 'sum'"),
        ({"metric_list": [{"metric": "f1", "aggregation": "mean"}]}, "metric 1: f1 has no aggregation 'mean'"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "metric 1: hf_evaluate fetches a program"),
        ({"metric_list": [{"metric": "acc", "higher_is_better": "yes"}]}, "metric 1: higher_is_better 'yes'"),
        ({"fewshot_config": {"sampler": "balanced"}}, "fewshot_config.sampler 'balanced'"),
        ({"fewshot_config": {"fewshot_indices": [0]}}, "fewshot_config.fewshot_indices is left out by lm-eval"),
        ({"filter_list": [{"name": "f", "filter": [{"function": "regx"}]}]}, "filter 1: function 'regx'; did you mean reg"),
        (
            {"filter_list": [{"name": "f", "filter": [{"function": "regex", "regex_pattern": "("}]}]},
            "filter f fails for the answer (-1.0, False): error: ",
        ),
        (
            {"filter_list": [{"name": "f", "filter": [{"function": "regex", "group_select": 1}]}]},
            "filter 1: group_select 1 is the number of a match",
        ),
        ({"doc_to_image": "q"}, "doc_to_image is not supported"),
        ({"doc_to_choice": None}, "doc_to_choice is missing"),
        ({"unsafe_code": True}, "own runs programs that the model wrote, and not in the sandbox"),
    ],
)  # fmt: skip
def test_definitions_that_mean_nothing(tmp_path, changes, words):
    """What lm-eval 0.4.13 leaves out without a word, or fails with after the model has answered."""
    assert words in told(tmp_path, jsonl(*GOOD), **changes)


@pytest.mark.parametrize(
    ("included", "words"),
    [
        ("own.yaml", "own.yaml includes itself"),
        ("gone.yaml", "include gone.yaml cannot be read (No such file"),
        ("/dev/zero", "include /dev/zero is no regular file"),
        ("list.yaml", "include list.yaml holds no mapping"),
        (3, "include 3 is not a file's name"),
    ],
)
def test_included_files_are_read_as_all_others(tmp_path, included, words):
    (tmp_path / "list.yaml").write_text("- a")
    assert words in told(tmp_path, jsonl(*GOOD), include=included)


def test_a_definition_is_all_of_its_files(tmp_path):
    """A result is not kept where an included file, or a module in a folder, has changed."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "base.yaml").write_text("description: first")
    (tmp_path / "lib" / "more.py").write_text("def f(docs):\n    return docs\n")
    (tmp_path / "test.jsonl").write_bytes(jsonl(*GOOD))
    text = yaml.safe_dump(
        TASK | {"include": ["lib/base.yaml"], "dataset_kwargs": {"data_files": {"test": "test.jsonl"}}}
    )
    (tmp_path / "own.yaml").write_text(text + "process_docs: !function lib.more.f\n")
    benchmark = suites.Benchmark("own", "own", "", None, str(tmp_path / "own.yaml"), own=True)
    found = {definitions.prepare(benchmark, None, tmp_path).definition_sha256}
    (tmp_path / "lib" / "base.yaml").write_text("description: second")
    found.add(definitions.prepare(benchmark, None, tmp_path).definition_sha256)
    (tmp_path / "lib" / "more.py").write_text("def f(docs):\n    return docs.select([0])\n")
    found.add(definitions.prepare(benchmark, None, tmp_path).definition_sha256)
    assert len(found) == 3


def bundle_of_piqa(folder: Path, labels: list[Any]) -> Path:
    place = folder / "bundle" / "baber__piqa" / "default"
    place.mkdir(parents=True)
    row = {"goal": "g", "sol1": "one", "sol2": "two", "label": 0}
    (place / "validation.jsonl").write_bytes(jsonl(*({**row, "label": label} for label in labels)))
    (place / "train.jsonl").write_bytes(jsonl(row, {**row, "goal": "h"}))
    return folder / "bundle"


def test_labels_of_a_bundle_are_checked_too(tmp_path):
    """lm-eval counts such an item as wrong, and warns where nobody looks."""
    prepared = definitions.prepare(suites.BENCHMARKS["piqa"], bundle_of_piqa(tmp_path, [0, 1, 2]), tmp_path)
    with pytest.raises(
        UserError, match=r"validation\.jsonl: row 3: doc_to_target \('label'\): label 2, and the choices are"
    ):
        task_loading.load(prepared)
    assert task_loading.load(prepared, limit=2).tasks["piqa"]  # those that are not asked may be what they like


def test_a_benchmark_has_rows_for_its_shots(tmp_path):
    benchmark = dataclasses.replace(suites.BENCHMARKS["piqa"], num_fewshot=3, variant=True, name="more", task="piqa")
    with pytest.raises(UserError, match="more has 2 rows for its 3 shots"):
        task_loading.load(definitions.prepare(benchmark, bundle_of_piqa(tmp_path, [0]), tmp_path))


def test_one_task_is_not_asked_in_two_ways(tmp_path):
    """In lm-eval's own format there would be one entry for both."""
    bundle = bundle_of_piqa(tmp_path, [0])
    first = suites.BENCHMARKS["piqa"]
    prepared = [
        definitions.prepare(found, bundle, tmp_path) for found in (first, dataclasses.replace(first, name="other"))
    ]
    task_loading.refuse_shared(prepared)
    prepared[1].benchmark = dataclasses.replace(first, name="other", num_fewshot=1)
    with pytest.raises(UserError, match="piqa and other both ask piqa, in two ways"):
        task_loading.refuse_shared(prepared)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "cannot be read (no JSON)"),
        (b"[]", "is not tinyllama eval's"),
        (b'{"results": {}}', "is not tinyllama eval's"),
        (b"\xff", "cannot be read (no JSON)"), (b'{"format": "tinyllama-results-1", "tasks": [1]}', "is damaged"),
        (b'{"format": "tinyllama-results-1", "tasks": {"a": 1}}', "is damaged"),
    ],
)  # fmt: skip
def test_a_foreign_or_damaged_results_file_is_not_written_over(tmp_path, content, words):
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(UserError) as raised:
        earlier_results.read(tmp_path / "results.json")
    assert words in str(raised.value)


WRITTEN = {
    "output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "{{a}}",
    "metric_list": [{"metric": "exact_match"}],
}  # fmt: skip


def steps(*names: str | dict[str, Any]) -> list[dict[str, Any]]:
    """A filter_list of one chain."""
    return [{"name": "f", "filter": [name if isinstance(name, dict) else {"function": name} for name in names]}]


@pytest.mark.parametrize(
    ("chain", "words"),
    [
        (steps({"function": "take_first_k", "k": 9}, "take_first"), "fails for the answer '': AssertionError: Need"),
        (steps({"function": "take_first_k", "k": 0}, "take_first"), "filter f fails for the answer '': IndexError"),
        (steps({"function": "take_first_k", "k": "1"}, "take_first"), "filter f fails for the answer '': TypeError"),
        (steps("multi_choice_regex", "take_first"), "filter f fails for the answer '': KeyError: 'choices'"),
        (steps("majority_vote"), "filter f leaves a list of answers, and none is right; end it with take_first"),
        (steps(), "filter f leaves a list of answers"),
        (steps("take_first", "take_first"), "function 2 comes after take_first, and would take each letter"),
        (steps("take_first", "remove_whitespace"), "function 2 comes after take_first"),
        (steps({"function": "map", "mapping_dict": {"a": "b"}}, "take_first"), "makes None of the answer ''"),
        (steps({"function": "regex", "fallback": 5}, "take_first"), "makes 5 of the answer '', which is not text"),
    ],
)  # fmt: skip
def test_filters_that_leave_no_answer_to_compare(tmp_path, chain, words):
    """lm-eval fails with them after the model has answered, or finds every answer wrong."""
    assert words in told(tmp_path, jsonl(*GOOD), **WRITTEN, filter_list=chain)


@pytest.mark.parametrize(
    "chain",
    [
        steps({"function": "regex", "regex_pattern": "(a)|(b)", "group_select": -1}, "take_first"),
        steps({"function": "take_first_k", "k": 2}, "majority_vote", "take_first"),
        steps({"function": "map", "mapping_dict": {"a": "b"}, "default_value": "c"}, "take_first"),
    ],
)
def test_filters_that_leave_one_answer(tmp_path, chain):
    task = load(tmp_path, jsonl(*GOOD), **WRITTEN, filter_list=chain, repeats=2)
    assert [filters.name for filters in task._filters] == ["f"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise KeyError('answer')", "fails for the answer '': KeyError in "),
        ("return {'exact_match': int(results[0].split(':')[1])}", "fails for the answer '': IndexError in "),
        ("raise SystemExit(0)", "fails for the answer '': SystemExit in "),
        ("return None", "gives None, no mapping of metrics"),
        ("return {'other': 1.0}", "gives other, and metric_list names exact_match"),
        ("return {'exact_match': '1'}", "gives exact_match '1', which has no mean"),
        ("return {'exact_match': [1.0]}", "gives exact_match [1.0], which has no mean"),
    ],
)
def test_scores_that_are_none(tmp_path, body, words):
    (tmp_path / "utils.py").write_text(f"def f(doc, results):\n    {body}\n")
    changes = WRITTEN | {"process_results": "!function utils.f"}
    changes["metric_list"] = [{"metric": "exact_match", "aggregation": "mean"}]
    assert f"process_results {words}" in told(tmp_path, jsonl(*GOOD), **changes)


def test_scores_are_tried_of_choices_too(tmp_path):
    (tmp_path / "utils.py").write_text("def f(doc, results):\n    return {'acc': results[1][0] / results[0][0]}\n")
    task = load(
        tmp_path,
        jsonl(*GOOD),
        process_results="!function utils.f",
        metric_list=[{"metric": "acc", "aggregation": "mean"}],
    )
    assert task.process_results(GOOD[0], [(-2.0, True), (-1.0, False)]) == {"acc": 0.5}


@pytest.mark.parametrize("text", ["007", "\u0663", "\u00b2"])
def test_digits_alone_that_are_no_number(tmp_path, text):
    told_of = told(tmp_path, jsonl({"q": "x", "a": 0}, {"q": text, "a": 0}))
    assert "test.jsonl:2: doc_to_text ('{{q}}'): digits alone are taken for a number, and these are none" in told_of
