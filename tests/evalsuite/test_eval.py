"""`tinyllama eval`: lm-eval's own numbers, from local data alone, kept over interruptions."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SHARED, tinyllama

from evalsuite import backends, parity, published, runner, suites, table

MINI = ROOT / "evalsuite" / "bundles" / "mini"
REAL = SHARED / "eval_data"
MC = "hellaswag,openbookqa,winogrande,arc_challenge,arc_easy,boolq,piqa"


def evaluate(model: Path, output: Path, *more: object, tasks: str = MC, **options) -> dict:
    done = tinyllama("eval", "--model", model, "--tasks", tasks, "--output", output, *more, timeout=500, **options)
    assert "torchao" not in done.stderr  # which transformers imports, and which would complain of its GPU kernels
    assert "register_constant" not in done.stderr
    return json.loads((output / "results.json").read_text())


def direct(
    model: Path, data: Path, leaves: dict[str, tuple[str, str | None, int | None]], limit: int, tmp: Path
) -> dict:
    """lm-eval itself, its hf backend and stock definitions, on local files; in a process of its own."""
    script = tmp / "direct.py"
    script.write_text(
        """
import os, sys, json
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_EVALUATE_OFFLINE="1")
model, data, leaves, limit, out, home = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:]
os.environ["HF_HOME"] = home
import datasets, lm_eval, glob
original = datasets.load_dataset
def local(path=None, name=None, **kwargs):
    folder = os.path.join(data, path.replace("/", "__"), name or "default")
    files = sorted(glob.glob(folder + "/*.jsonl"), key=lambda f: f.endswith("train.jsonl"))
    return original("json", data_files={os.path.basename(f)[:-6]: f for f in files})
datasets.load_dataset = local
from lm_eval.tasks import TaskManager
from lm_eval.models.huggingface import HFLM
lm = HFLM(pretrained=model, dtype="float32", batch_size=16, device="cpu")
manager = TaskManager()
found = {}
for task, shots in leaves.items():
    results = lm_eval.simple_evaluate(model=lm, tasks=[task], num_fewshot=shots, limit=limit, task_manager=manager,
                                      bootstrap_iters=1000)
    group = results.get("groups") or {}
    found[task] = group.get(task) or results["results"][task]
json.dump({k: {m: float(v) for m, v in r.items() if isinstance(v, (int, float)) or hasattr(v, "item")}
           for k, r in found.items()}, open(out, "w"))
"""
    )
    arguments = [str(model), str(data), json.dumps(leaves), str(limit), str(tmp / "direct.json"), str(tmp / "home")]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((tmp / "direct.json").read_text())


@pytest.fixture(scope="module")
def native(export, tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("eval") / "native"
    return output, evaluate(export, output, "--data-dir", "mini", "--limit", 4, tasks="all")


def test_every_benchmark_of_both_suites_has_a_value(native):
    output, results = native
    assert set(results["tasks"]) == set(suites.BENCHMARKS)
    for name, entry in results["tasks"].items():
        benchmark = suites.BENCHMARKS[name]
        assert entry["metric"] == benchmark.metric
        assert 0 <= entry["value"] <= 1
        assert entry["num_fewshot"] == benchmark.num_fewshot
        assert entry["n"] == (4 if benchmark.leaves == 1 else sum(leaf["n"] for leaf in entry["leaves"].values()))
        assert entry["protocol"] == "harness"
        assert (output / "samples" / f"{name}.jsonl").exists()
        assert entry["ci95"]["low"] <= entry["value"] <= entry["ci95"]["high"]
        assert entry["ci95"]["method"] in ("wilson", "score")
    assert len(results["tasks"]["mmlu"]["leaves"]) == 57
    assert len(results["tasks"]["bbh"]["leaves"]) == 27
    for suite, members in suites.SUITES.items():
        mean = sum(results["tasks"][m.name]["value"] for m in members) / len(members)
        assert results["suites"][suite]["value"] == pytest.approx(mean)
    record = json.loads((Path(results["model"]) / "tinyllama_export.json").read_text())
    assert results["content_sha256"] == record["content_sha256"]


def test_the_bundle_has_at_least_twenty_items_of_each_benchmark():
    for benchmark in suites.BENCHMARKS.values():
        if benchmark.name == "humaneval":
            continue
        config = {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}.get(benchmark.name, "*")
        folders = list((MINI / benchmark.dataset).glob(config))
        assert len(folders) == benchmark.leaves
        split = "test" if (folders[0] / "test.jsonl").exists() else "validation"
        rows = [json.loads(line) for f in folders for line in (f / f"{split}.jsonl").read_text().splitlines()]
        assert len(rows) >= 20
        assert len({json.dumps(row, sort_keys=True) for row in rows}) == len(rows)
        if benchmark.name == "mmlu":
            assert all(len((f / "dev.jsonl").read_text().splitlines()) == 5 for f in folders)


def test_rows_have_the_columns_of_the_real_data_sets():
    if not REAL.exists():
        pytest.skip("real benchmark items are not part of this project (../shared/eval_data is absent)")
    for path in sorted(MINI.rglob("*.jsonl")):
        real = REAL / path.relative_to(MINI)
        ours, theirs = (json.loads(p.read_text().splitlines()[0]) for p in (path, real))
        assert {k: type(v) for k, v in ours.items()} == {k: type(v) for k, v in theirs.items()}, path
        rows = [[json.loads(line) for line in p.read_text().splitlines()] for p in (path, real)]
        texts = [{v for row in found for v in row.values() if isinstance(v, str) and len(v) > 40} for found in rows]
        assert not texts[0] & texts[1], path


def test_native_hf_and_lm_eval_itself_agree_on_every_item(native, export, tmp_path):
    """The same scores to the last digit, and the same choice on every item."""
    output, ours = native
    theirs = evaluate(export, tmp_path / "hf", "--data-dir", MINI, "--limit", 4, "--backend", "hf", tasks=f"{MC},drop")
    for name in theirs["tasks"]:
        for key in ("value", "stderr", "n", "metrics"):
            assert ours["tasks"][name][key] == theirs["tasks"][name][key], (name, key)
        a, b = (
            [json.loads(line) for line in (folder / "samples" / f"{name}.jsonl").read_text().splitlines()]
            for folder in (output, tmp_path / "hf")
        )
        assert [s["doc_hash"] for s in a] == [s["doc_hash"] for s in b]
        for metric in {"acc", "acc_norm", "f1", "em"} & set(a[0]):
            assert [s[metric] for s in a] == [s[metric] for s in b]
        for left, right in zip(a, b, strict=True):
            if name == "drop":
                assert left["resps"] == right["resps"]
            else:
                scores = [[float(r[0][0]) for r in s["resps"]] for s in (left, right)]
                assert scores[0] == pytest.approx(scores[1], abs=2e-4)
    itself = direct(export, MINI, {name: (3 if name == "drop" else 0) for name in theirs["tasks"]}, 4, tmp_path)
    for name, entry in theirs["tasks"].items():
        assert itself[name][entry["metric_key"]] == entry["value"], name


def test_real_items_give_lm_evals_values(export, tmp_path):
    """On ../shared/eval_data: `tinyllama eval` equals calling lm-eval, both backends, groups included."""
    if not REAL.exists():
        pytest.skip("real benchmark items are not part of this project (../shared/eval_data is absent)")
    limit = 8
    tasks = f"{MC},drop,bbh,mmlu"
    native = evaluate(export, tmp_path / "native", "--data-dir", REAL, "--limit", limit // 4, tasks=tasks)
    names = dict.fromkeys(MC.split(","), 0) | {"drop": 3, "mmlu": 5, "bbh_fewshot": None}
    itself = direct(export, REAL, names, limit // 4, tmp_path)
    itself["bbh"] = itself.pop("bbh_fewshot")
    for name, entry in native["tasks"].items():
        assert itself[name][entry["metric_key"]] == entry["value"], name


def test_a_checkpoint_scores_as_its_export(native, finished_run, tmp_path):
    results = evaluate(finished_run, tmp_path / "out", "--data-dir", "mini", "--limit", 4, tasks="arc_easy,piqa")
    for name, entry in results["tasks"].items():
        assert entry["metrics"] == native[1]["tasks"][name]["metrics"]


def test_results_are_in_lm_evals_own_format_too(native):
    """lm-eval's table of our file, and for each leaf task the log that its viewers look for."""
    from lm_eval.utils import get_latest_filename, get_results_filenames, get_sample_results_filenames, make_table

    output, results = native
    names = [str(path) for path in (output / "lm_eval").iterdir()]
    found = json.loads(Path(get_latest_filename(get_results_filenames(names))).read_text())
    logs = get_sample_results_filenames(names)
    assert len(names) == 1 + len(logs) == 1 + 9 + 57 + 27
    rows = [[cell.strip() for cell in line.split("|")] for line in make_table(found).splitlines()]
    shown = {row[1].strip(" -"): [r[7] for r in rows[i:]] for i, row in enumerate(rows) if len(row) > 7}
    for name, entry in results["tasks"].items():
        assert found["results"][name][entry["metric_key"]] == entry["value"]
        assert any(float(value) == round(entry["value"], 4) for value in shown[name][:2])
        assert set(entry["leaves"]) == set(found["group_subtasks"].get(name, []))
    for name in found["configs"]:
        lines = next((output / "lm_eval").glob(f"samples_{name}_2*.jsonl")).read_text().splitlines()
        assert len(lines) == found["n-samples"][name]["effective"]
    assert found["config"]["model_args"]["pretrained"] == found["model_name"] == results["model"]


def test_what_is_finished_is_kept_and_its_clean_items_scored(native, export, stores, tokenizer_model, tmp_path):
    output, report = tmp_path / "again", tmp_path / "contamination.json"
    shutil.copytree(native[0], output)
    results = json.loads((output / "results.json").read_text())
    del results["tasks"]["piqa"]
    (output / "results.json").write_text(json.dumps(results))
    store = next(path.parent for path in stores.rglob("manifest.json"))
    tinyllama("data", "contamination", store, "--against", MINI, "--tokenizer", tokenizer_model, "--output", report)
    arguments = ["--model", export, "--tasks", "all", "--data-dir", "mini", "--limit", 4, "--output", output]
    done = tinyllama("eval", *arguments, "--contamination", report)
    lines = [line for line in done.stderr.splitlines() if " s" in line and ": " in line]
    assert len([line for line in lines if "kept from before" in line]) == 10
    again = json.loads((output / "results.json").read_text())
    assert {n: e["value"] for n, e in again["tasks"].items()} == {n: e["value"] for n, e in native[1]["tasks"].items()}
    kept, before = (next((folder / "lm_eval").glob("results_*.json")) for folder in (output, native[0]))
    assert kept.name == before.name
    assert json.loads(kept.read_text())["results"] == json.loads(before.read_text())["results"]
    statuses = {(item["set"], item["row"]): item["status"] for item in json.loads(report.read_text())["items"]}
    for name, entry in again["tasks"].items():
        counts = {key: entry["clean"][key] for key in ("n", "overlap", "short", "unknown")}
        assert sum(counts.values()) == entry["n"]
        # HumanEval's items do not come from the bundle.
        assert counts["unknown"] == (entry["n"] if name == "humaneval" else 0)
    first = [statuses["baber__piqa/default/validation", row] for row in range(4)]
    assert again["tasks"]["piqa"]["clean"]["n"] == first.count("clean")
    assert "clean items only" in done.stdout
    assert "are not in the report" in done.stdout


def test_nothing_touches_the_network(export, tmp_path):
    """In a network namespace without interfaces, with no cache to fall back on."""
    command = ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-m", "tinyllama", "eval", "--model"]
    command += [str(export), "--tasks", "arc_easy,humaneval", "--data-dir", "mini", "--limit", "2"]
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    if subprocess.run([*command[:4], "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine does not permit network namespaces")
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out")], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "HumanE" in done.stdout or "HumanEval" in done.stdout


def test_vllm_backend_gives_the_same_choices(native, export, tmp_path):
    """The real vLLM, its CPU build, through lm-eval's backend."""
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    results = evaluate(
        export,
        tmp_path / "vllm",
        "--data-dir",
        "mini",
        "--limit",
        4,
        "--backend",
        "vllm",
        tasks="arc_easy",
        env=environment,
    )
    assert results["parity"]["with"] == "native"
    assert results["parity"]["largest_logprob_difference"] < 1e-3
    pairs = [
        [json.loads(line) for line in (output / "samples" / "arc_easy.jsonl").open()]
        for output in (native[0], tmp_path / "vllm")
    ]
    for ours, theirs in zip(*pairs, strict=True):
        assert ours["doc_hash"] == theirs["doc_hash"]
        ours_scores, theirs_scores = ([float(score) for score, _ in row["filtered_resps"]] for row in (ours, theirs))
        assert theirs_scores == pytest.approx(ours_scores, abs=5e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "hellaswagg", "--data-dir", "mini"], "did you mean hellaswag"),
        (["--tasks", "commonsense", "--data-dir", "nowhere"], "nowhere is not a folder"),
        (["--tasks", ",", "--data-dir", "mini"], "names no task"),
        (["--tasks", "piqa", "--data-dir", "mini", "--limit", "0"], "--limit 0"),
        (["--tasks", "piqa", "--data-dir", "mini", "--backend", "tpu"], "--backend tpu"),
        (["--tasks", "piqa", "--data-dir", "mini", "--dtype", "int3"], "--dtype int3"),
    ],
)
def test_mistakes_are_one_line(export, tmp_path, arguments, words):
    done = tinyllama("eval", "--model", export, *arguments, "--output", tmp_path / "out", check=False)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert words in errors[0]


@pytest.mark.parametrize("damage", ["missing", "corrupt", "empty"])
def test_a_damaged_bundle_names_the_file(export, tmp_path, damage):
    shutil.copytree(MINI / "baber__piqa", tmp_path / "bundle" / "baber__piqa")
    path = tmp_path / "bundle" / "baber__piqa" / "default" / "validation.jsonl"
    if damage == "missing":
        shutil.rmtree(path.parent)
    else:
        path.write_text("" if damage == "empty" else path.read_text()[:-20])
    done = tinyllama(
        "eval",
        "--model",
        export,
        "--tasks",
        "piqa",
        "--data-dir",
        tmp_path / "bundle",
        "--output",
        tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert "baber__piqa" in done.stderr


def test_published_averages_are_those_of_their_cells():
    for row in published.rows():
        mean = sum(row.values.values()) / len(row.values)
        assert mean == pytest.approx(row.average_recomputed, abs=0.0051), row.model
    three = next(r for r in published.rows() if r.model == "TinyLlama-1.1B 3T" and r.suite == "commonsense")
    assert (three.average_printed, three.average_recomputed) == (52.99, 52.97)
    assert next(r for r in published.rows() if r.model == "OPT-1.3B").is_low("boolq")


def test_combined_value_and_error_are_lm_evals():
    from lm_eval.api.metrics import pooled_sample_stderr

    value, stderr = runner.combine([0.25, 0.5], [0.1, 0.2], [40, 10])
    assert value == pytest.approx(0.3)
    assert stderr == pytest.approx(pooled_sample_stderr([0.1, 0.2], [40, 10]))
    assert runner.combine([0.5, 1.0], [None, 0.1], [1, 5]) == (pytest.approx(11 / 12), None)
    assert runner.combine([1.0, 0.0, 0.0], [None] * 3, [1, 1, 1]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))


def test_table_marks_protocol_confidence_and_faults(native):
    from rich.console import Console

    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    table.print_comparison(native[1], console)
    text = console.export_text()
    for words in ("instruct-eval", "harness", "† low confidence", "dictionary", "unstripped", "52.99", "19.87", "n/a"):
        assert words in text or (words == "n/a" and "no published problem-solving row" in text)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    written = (native[0] / "table.md").read_text()
    assert "| harness" in written
    assert "native backend, float32)" in written


def test_conversions_that_need_no_comparison_say_why(finished_run, export, tmp_path, monkeypatch):
    cached = tmp_path / "hub" / "models--owner--name"
    for file, content in (("refs/main", "abc"), ("snapshots/abc/config.json", '{"model_type": "llama"}')):
        (cached / file).parent.mkdir(parents=True)
        (cached / file).write_text(content)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def reason(model: Path | str, backend: str) -> dict | None:
        choice = backends.choose(str(model), backend, "float32", None, None)
        return parity.not_compared(choice, backends.content_sha256(choice))

    assert reason("owner/name", "hf") == {"compared": False, "reason": "a hub model: no files here"}
    assert reason(finished_run, "native") == {"compared": False, "reason": "a checkpoint: not converted"}
    proven = reason(export, "native")
    assert proven["compared"]
    assert proven["largest_logit_difference"] < 1e-4
    assert reason(export, "hf") is None
    changed = tmp_path / "changed"
    shutil.copytree(export, changed)
    (changed / "config.json").write_text((changed / "config.json").read_text() + " ")
    assert reason(changed, "native") is None, "an export that was changed is not the one that was proven"
