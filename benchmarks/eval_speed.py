"""Evaluation speed: the native backend against lm-eval's own hf backend, on the same model, items and machine, in fp32.

    python benchmarks/eval_speed.py                                 all suites, about 20 minutes on two cores
    python benchmarks/eval_speed.py --suites commonsense --limit 50
    python benchmarks/eval_speed.py --model exports/1b              a model of one's own

Each backend and suite is a process of its own: lm-eval's stock definitions over the items of a bundle (../shared/eval_data
where it is there, else the small one in the package), lm-eval's hf backend in its batches of 16, ours as `tinyllama eval`
runs it. `seconds` is the whole of lm-eval's simple_evaluate, request building and metrics with it; `model s` what was
spent inside the backend. Without --model a Llama of seeded random weights is made, with Llama 2's tokenizer.

Items differ where the choice (or, for a generated answer, the text) is not the same; `alone` counts the tokens of every
request by itself, `tree` those of the unique prefixes, below which no exact backend can go.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import record, show

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
COMMONSENSE = "hellaswag,openbookqa,winogrande,arc_challenge,arc_easy,boolq,piqa"
# tasks, items of each leaf, and the bar that we set ourselves
SUITES = {"commonsense": (COMMONSENSE, 200, 2.4), "mmlu": ("mmlu", 20, 7.5), "bbh": ("bbh", 8, 4.5)}
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


# -- One backend on one suite, in its own process ------------------------------------------------------------------------


def timed(model: Any, began: float) -> dict[str, float]:
    """Wraps the backend's two calls; gives where their times are kept."""
    spent = {"model_s": 0.0, "first_item_s": 0.0}

    def wrap(call: Any) -> Any:
        def inside(*args: Any, **kwargs: Any) -> Any:
            entered = time.perf_counter()
            spent["first_item_s"] = spent["first_item_s"] or time.time() - began
            found = call(*args, **kwargs)
            spent["model_s"] += time.perf_counter() - entered
            return found

        return inside

    model.loglikelihood, model.generate_until = wrap(model.loglikelihood), wrap(model.generate_until)
    return spent


def chosen(sample: dict[str, Any]) -> Any:
    """What one item came to: the index of the most likely answer, or the text."""
    answers = [response[0] for response in sample["resps"]]
    if isinstance(answers[0], str):
        return answers[0]
    scores = [float(score) for score, _ in answers]
    return scores.index(max(scores))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Evaluate one suite with one backend; times, tokens and every item's choice."""
    began = float(os.environ["EVAL_SPEED_BEGAN"])
    sys.path.insert(0, str(ROOT))
    from evalsuite import backends, bundle, definitions, runner, suites

    with tempfile.TemporaryDirectory() as scratch:
        data = bundle.find(arguments.data_dir)
        bundle.go_offline(Path(scratch) / "huggingface")
        runner.quieten()
        tasks, items, _ = SUITES[arguments.suites]
        prepared = [definitions.prepare(benchmark, data, Path(scratch)) for benchmark in suites.select(tasks)]
        if arguments.one == "native":
            model = backends.make(backends.choose(arguments.model, "native", "float32", None, None), Path(scratch))
        else:
            from lm_eval.models.huggingface import HFLM

            model = HFLM(pretrained=arguments.model, dtype="float32", batch_size=arguments.batch_size, device="cpu")
        spent = timed(model, began)
        entered = time.perf_counter()
        limit = arguments.limit or items
        if arguments.one == "native":
            found = [runner.run_task(model, task, limit) for task in prepared]
        else:
            import lm_eval
            from lm_eval.tasks import TaskManager

            folders = [str(folder) for folder in Path(scratch).glob("tasks-*")]
            leaves = [leaf for task in prepared for leaf in task.leaves]
            manager = TaskManager(include_path=folders, include_defaults=False)
            found = [lm_eval.simple_evaluate(model=model, tasks=leaves, task_manager=manager, limit=limit)]
        seconds = time.perf_counter() - entered
        choices = {
            f"{leaf} {sample['doc_hash']} {sample['filter']} {sample['doc_id']}": chosen(sample)
            for results in found
            for leaf, samples in (results or {})["samples"].items()
            for sample in samples
        }
        tokens = {"tokens": vars(model.work)} if arguments.one == "native" else {}
        return {"seconds": seconds, **spent, **tokens, "choices": choices}


# -- All of them -----------------------------------------------------------------------------------------------------------


def make_model(folder: Path) -> str:
    """A Llama of random weights with Llama 2's tokenizer, as a Hugging Face directory."""
    sys.path.insert(0, str(ROOT))
    from transformers import LlamaConfig, LlamaForCausalLM

    from tinyllama.model.config import ModelConfig
    from tinyllama.model.llama import Llama
    from tinyllama.tokenizer.export import export_hf

    tokenizer = SHARED / "tokenizer" / "llama2" / "tokenizer.model"
    if not tokenizer.exists():
        sys.exit(f"error: {tokenizer} does not exist; fix: give --model, a Hugging Face directory of a Llama")
    ours = Llama(ModelConfig(**SHAPE))
    ours.initialize(1)
    theirs = LlamaForCausalLM(LlamaConfig(**ours.config.to_hf()))
    theirs.load_state_dict(ours.state_dict())
    theirs.save_pretrained(folder)
    export_hf(tokenizer, folder)
    return str(folder)


def in_own_process(arguments: argparse.Namespace, backend: str, suite: str, model: str) -> dict[str, Any]:
    """One backend on one suite."""
    command = [sys.executable, __file__, "--one", backend, "--suites", suite, "--model", model]
    command += ["--data-dir", arguments.data_dir, "--batch-size", str(arguments.batch_size)]
    command += ["--limit", str(arguments.limit)] if arguments.limit else []
    environment = {**os.environ, "EVAL_SPEED_BEGAN": str(time.time())}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(f"error: {backend} on {suite} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--suites", default=",".join(SUITES), help="of: " + ", ".join(SUITES))
    parser.add_argument("--limit", type=int, help="items of each task (MMLU, BBH: of each leaf)")
    parser.add_argument("--model", help="Hugging Face directory of a Llama")
    parser.add_argument("--data-dir", default=str(SHARED / "eval_data") if SHARED.exists() else "mini")
    parser.add_argument("--batch-size", type=int, default=16, help="rows, of the hf backend")
    parser.add_argument("--output", type=Path, help="JSON; default benchmarks/results/eval_speed.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.one:
        print("\n" + json.dumps(measure(arguments)), flush=True)
        os._exit(0)
    names = arguments.suites.split(",")
    if unknown := [name for name in names if name not in SUITES]:
        sys.exit(f"error: --suites {unknown[0]}; valid: {', '.join(SUITES)}")
    results: dict[str, Any] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or make_model(Path(folder) / "model")
        for name in names:
            ours, theirs = (in_own_process(arguments, backend, name, model) for backend in ("native", "hf"))
            before, after = theirs.pop("choices"), ours.pop("choices")
            assert before.keys() == after.keys()
            differing = sum(before[key] != after[key] for key in before)
            tokens = ours["tokens"]
            results[name] = {
                "items": len(before),
                "differing": differing,
                "speedup": theirs["seconds"] / ours["seconds"],
                "model_speedup": theirs["model_s"] / ours["model_s"],
                "bar": SUITES[name][2],
                "native": ours,
                "hf": theirs,
            }
            found = results[name]
            figures = [f"{found['items']:,}", str(differing), f"{theirs['seconds']:.1f}", f"{ours['seconds']:.1f}"]
            figures += [f"{found['speedup']:.2f}", f"{SUITES[name][2]:.1f}", f"{found['model_speedup']:.2f}"]
            figures += [f"{tokens['alone']:,}", f"{tokens['tree']:,}", f"{tokens['computed']:,}"]
            figures += [f"{theirs['first_item_s']:.1f}", f"{ours['first_item_s']:.1f}"]
            rows.append([name, *figures])
            print(f"{name}: {found['speedup']:.2f} times as fast, {differing} items differ", flush=True)
    columns = ["", "items", "differ", "hf s", "ours s", "speed-up", "bar", "in the model"]
    columns += ["tokens alone", "tree", "computed", "hf first item s", "ours"]
    show("tinyllama eval against lm-eval's hf backend, fp32", columns, rows)
    shape = SHAPE if not arguments.model else arguments.model
    packages = ["torch", "transformers", "lm_eval"]
    print(record("eval_speed", packages, {"model": shape, "suites": results}, arguments.output))


if __name__ == "__main__":
    main()
