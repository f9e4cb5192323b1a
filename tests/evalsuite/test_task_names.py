"""A name of a task or a suite is a name: from no place that can give one does it become a path of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evalsuite import completions, definitions, manifest, names, own_suites, samples, suites, yaml_files
from evalsuite.lm_eval_format import ResultsFile
from tinyllama.data.durable import write_text
from tinyllama.errors import DataError, UserError

PATHS = (
    "/tmp", "..", ".", "../../x", "a/b", "a/../../b", "~", "~root", ".hidden", "a b", "a\nb", "a\0b", "a\\b", "C:x",
    "$HOME", "*", "", "é", "ａ", "x" * 201, "-/..", "...",
)  # fmt: skip
TASK = """
dataset_path: json
dataset_kwargs:
  data_files: {test: rows.jsonl}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: ["yes", "no"]
doc_to_target: a
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of a suite and its task, beside one that is to stay as it is."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "precious").write_text("weights")
    (tmp_path / "mine" / "rows.jsonl").write_text('{"q": "x", "a": 0}\n{"q": "y", "a": 1}\n')
    (tmp_path / "mine" / "task.yaml").write_text(f"task: own{TASK}")
    return tmp_path / "mine"


def untouched(folder: Path) -> bool:
    return (folder.parent / "victim" / "precious").read_text() == "weights" and {
        path.name for path in folder.parent.iterdir()
    } <= {"mine", "victim", "scratch"}


@pytest.mark.parametrize("name", PATHS)
def test_no_name_from_anywhere_is_a_path(folder, name):
    """Of a suite, of a task of it, inside of a task's file, on the command line, in a results file."""
    suite, task = folder / "suite.yaml", folder / "task.yaml"
    suite.write_text(json.dumps({"name": name, "tasks": ["task.yaml"]}))
    with pytest.raises(UserError, match="name"):
        own_suites.load(suite)
    suite.write_text(json.dumps({"name": "mine", "tasks": [{"task": "task.yaml", "name": name}]}))
    with pytest.raises(UserError, match="task 1: name"):
        own_suites.load(suite)
    suite.write_text(json.dumps({"name": "mine", "tasks": ["task.yaml"]}))
    task.write_text(f"task: {json.dumps(name)}{TASK}")
    with pytest.raises(UserError, match=r"task 1: .*task\.yaml: task"):
        own_suites.load(suite)
    if name.strip() and "," not in name:
        with pytest.raises(UserError):
            suites.choose(name)
    with pytest.raises(UserError):
        samples.path_of(folder, name)
    assert untouched(folder)


@pytest.mark.parametrize("where", ["/victim", "../victim", "../../victim"])
def test_folders_stay_as_they_are(folder, where):
    """The last line of defence, for whatever made the benchmark."""
    name = str(folder.parent / "victim") if where == "/victim" else where
    scratch = folder.parent / "scratch"
    scratch.mkdir()
    with pytest.raises(UserError):
        definitions.prepare(suites.Benchmark(name, name, "", None, str(folder / "task.yaml"), own=True), None, scratch)
    assert untouched(folder)
    assert not list(scratch.iterdir())


def test_a_link_in_the_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "own.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link"):
        samples.path_of(tmp_path, "own")


def test_a_name_in_written_completions_is_no_path(tmp_path):
    """--rescore writes the samples of the benchmarks that the folder names."""
    line = {"benchmark": "../../x", "prompt_hash": "", "doc_id": 0, "index": 0, "completion": ""}
    (tmp_path / "completions.jsonl").write_text(json.dumps(line))
    results = {"format": "tinyllama-results-1", "tasks": {"../../x": {}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match=r"name '\.\./\.\./x'"):
        completions.rescore(tmp_path, lambda name: None)


def test_the_longest_names_can_be_written(folder, tmp_path):
    """Names at their limit, and lm-eval's own with parentheses, are file names everywhere."""
    longest = "x" * names.MOST
    write_text(samples.path_of(tmp_path, longest), ["{}"])
    assert samples.path_of(tmp_path, longest).read_text() == "{}"
    for leaf in ("egymmlu_arabic_language_(general)", f"{longest}_{longest}"):
        assert names.NAME.fullmatch(names.stem(leaf))
        record = {
            "settings": {"dtype": "float32", "max_length": None, "batch_size": 1, "limit": None}, "model": "m",
            "backend": "native", "versions": {"transformers": "5", "lm_eval": "0"},
        }  # fmt: skip
        file = ResultsFile(tmp_path / "lm_eval", record, {"own": "key"})
        file.add("own", {"seconds": 0, "leaves": {}}, {"samples": {leaf: []}})
        assert list((tmp_path / "lm_eval").glob(f"samples_{names.stem(leaf)}_*.jsonl"))
    assert names.stem("arc_easy") == "arc_easy"


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ('[task.yaml, {task: task.yaml, name: OWN}]', "task 'OWN' is there twice, once as 'own'"),
        ("[task.yaml, task.yaml]", "task 'own' is there twice"),
        ("[{task: task.yaml, name: Mine}]", "a task and the suite are both named 'mine'"),
        ("[{task: task.yaml, name: commonsense}]", "name 'commonsense' is one of ours"),
        ("[{task: task.yaml, name: PIQA}]", "name 'PIQA' is one of ours"),
        ("[{task: task.yaml, name: all}]", "name 'all' is one of ours"),
        ('[{task: task.yaml, title: "a\\nb"}]', "title 'a\\nb'; give one line"),
        ('[{task: task.yaml, title: ""}]', "title ''; give one line"),
    ],
)  # fmt: skip
def test_names_that_collide_are_refused(folder, tasks, words):
    (folder / "suite.yaml").write_text(f"name: mine\ntasks: {tasks}")
    with pytest.raises(UserError) as raised:
        own_suites.load(folder / "suite.yaml")
    assert words in str(raised.value)


def test_a_task_and_another_suite_of_one_name_are_refused(folder):
    (folder / "first.yaml").write_text("name: mine\ntasks: [{task: task.yaml, name: second}]")
    (folder / "second.yaml").write_text("name: second\ntasks: [task.yaml]")
    with pytest.raises(UserError, match="names a task and a suite 'second'"):
        suites.choose(f"{folder / 'first.yaml'},{folder / 'second.yaml'}")


def test_a_bundle_holds_what_its_manifest_names(tmp_path):
    for place in ("../x/y/test.jsonl", "/etc/passwd"):
        entry = {"sha256": "", "bytes": 0, "rows": 0}
        (tmp_path / "manifest.json").write_text(json.dumps({"format": manifest.FORMAT, "files": {place: entry}}))
        with pytest.raises(DataError, match="is not in the bundle"):
            manifest.read(tmp_path)


def bomb() -> str:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)]
    return "name: mine\ntasks:\n  - {" + ", ".join(lines) + "}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (bomb(), "its aliases unfold to very much"),
        ("name: mine\ntasks: &a [*a]", "its aliases unfold to very much"),
        ("name: mine\ntasks: " + "[" * 1500, "is nested too deeply"),
        ("name: mine\ntasks: !!python/object/apply:os.system ['true']", ":2 is not YAML (could not determine"),
        ("name: mine\nname: yours\ntasks: [piqa]", ":2 is not YAML (key 'name' is there twice)"),
        ("name: mine\ntasks: [piqa]\n1: 2", "key 1 is not text"),
        ("name: mine\ntasks: [piqa]\ntitle: 2020-13-45", "is not YAML (month must be in 1..12)"),
        ("", "holds no mapping"),
        ("name: null\ntasks: [piqa]", "name None is not text"),
        ("name: mine\ntasks: null", "tasks None is not a list"),
        ("name: mine\ntasks: [{task: null}]", "task None is not text"),
        ("name: mine\ntasks: [piqa]\n---\nname: b", "is not YAML"),
        (b"name: caf\xe9\ntasks: [piqa]", ":1 is not UTF-8 (byte 0xe9)"),
        ("name: mine\ntasks: [piqa]\n# é".encode("utf-16"), ":1 is not UTF-8"),
        (b"name: mine\0", "is not YAML"),
        ("# " + "x" * yaml_files.MOST_BYTES, "has more than 4 MiB"),
    ],
)  # fmt: skip
def test_what_is_no_suite_is_told_in_one_line(tmp_path, content, words):
    path = tmp_path / "suite.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as raised:
        own_suites.load(path)
    assert words in str(raised.value)
    assert str(raised.value).startswith(str(path))
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "missing", "below a file"])
def test_what_is_no_file_is_not_read(tmp_path, kind):
    import os

    path = tmp_path / "suite.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "below a file":
        path.write_text("")
        path = path / "suite.yaml"
    with pytest.raises(UserError, match=r"is a folder|is no regular file|cannot be read"):
        own_suites.load(path)
