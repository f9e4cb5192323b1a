"""Shared, real, small inputs: a corpus that CPython ships, a tokenizer trained on it, token stores, a trained run."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tinyllama.tokenizer.sentencepiece_model import Tokenizer

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores: with two threads each they would wait for one another at every operation.
    os.environ["OMP_NUM_THREADS"] = "1"

os.environ.pop("PYTHONUNBUFFERED", None)  # few users set it, and without it output can be lost at an end

for _number in (
    signal.SIGHUP,
    signal.SIGINT,
):  # ignored under nohup, and in a script's background: not by what tests start
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)

# Files that take a minute and more, begun first so that no worker is left with one of them at the end.
LONGEST = (
    "test_pretrain", "test_eval", "test_online", "test_health", "test_parity", "test_speculative", "test_start",
    "test_slurm", "test_checkpoints", "test_bundles", "test_copies", "test_passing", "test_measurement", "test_server",
)  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
LLAMA2 = SHARED / "tokenizer" / "llama2" / "tokenizer.model"
VOCAB_SIZE = 600
TINY_MODEL = [
    f"model.vocab_size={VOCAB_SIZE}",
    "model.hidden_size=128",
    "model.intermediate_size=352",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.max_position_embeddings=2048",
    "data.sequence_length=64",
    "training.batch_tokens=768",
    "optimizer.warmup_steps=2",
    "checkpoint.every_steps=3",
    "checkpoint.keep_last=10",
    "validation.max_sequences=8",
]


HANDLED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

# Even root is refused once it may not override permissions.
WITHOUT_PRIVILEGES = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--inh-caps", "-all")


def wants_gpu(expression: str) -> bool:
    """Whether an expression after `-m` asks for the tests of a GPU: `gpu`, `gpu or slow`, but not `not gpu`."""
    words = expression.replace("(", " ").replace(")", " ").split()
    return any(word == "gpu" and before != "not" for before, word in zip(["", *words], words, strict=False))


def pytest_configure(config: pytest.Config) -> None:
    """Without `-m gpu` this process and its children find no GPU: tests start two ranks, and compare with other machines."""
    if not wants_gpu(config.option.markexpr):
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first; xdist gives out files in this order (--no-loadscope-reorder).

    Tests for a GPU need `-m gpu`, whatever else an expression selects.
    """
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))
    of_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not of_gpu:
        return
    if not wants_gpu(config.option.markexpr):
        config.hook.pytest_deselected(items=of_gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        return
    import torch

    if not torch.cuda.is_available():
        for item in of_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def skip_unless_privileges_can_be_dropped() -> None:
    if os.geteuid() != 0 or subprocess.run([*WITHOUT_PRIVILEGES, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs setpriv as root")


def tinyllama(
    *arguments: object, check: bool = True, under: Sequence[str] = (), **options
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own; `under`: another command that starts it."""
    command = [*under, sys.executable, "-m", "tinyllama", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **options.pop("env", {})}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=options.pop("cwd", ROOT), **options
    )
    if check:
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def members(mark: str) -> list[int]:
    """Processes that run with this word in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                pass
    return found


def until(condition, seconds: float = 30) -> bool:
    """Whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(found)


def settings(*more: str) -> list[str]:
    """`--set` arguments for the tiny model."""
    return [argument for setting in (*TINY_MODEL, *more) for argument in ("--set", setting)]


def train(data: Path, output: Path, *more: str, ranks: int = 2, extra: tuple[str, ...] = (), check: bool = True):
    """A real DeepSpeed ZeRO-3 run of the tiny model."""
    arguments = ["train", "--recipe", "demo", "--data", data, "--output", output, "--num-accelerators", ranks]
    return tinyllama(*arguments, *settings(*more), *extra, check=check, timeout=300)


def preparing(inputs: Path, output: Path, tokenizer_model: Path) -> list[object]:
    """The arguments of `tinyllama data prepare`."""
    return ["data", "prepare", inputs, "--output", output, "--tokenizer", tokenizer_model]


def content(store: Path) -> dict[str, bytes]:
    """Every file of a token store but the one that says how it was asked for."""
    return {path.name: path.read_bytes() for path in store.iterdir() if path.name != "prepared.json"}


@contextlib.contextmanager
def restored_handlers() -> Iterator[dict[int, object]]:
    """The handlers of signals before, which they are again afterwards."""
    before = {number: signal.getsignal(number) for number in HANDLED}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def handlers_of_signals() -> Iterator[None]:
    """What a test leaves ignored, all programs that later tests start would ignore as well: it fails here, not there."""
    with restored_handlers() as before:
        yield
        after = {number: signal.getsignal(number) for number in HANDLED}
    assert after == before


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """made_once(name, fill): a folder that the first worker to need it fills; others wait for it. Nobody writes there."""
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made-once"
    shared.mkdir(exist_ok=True)

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with FileLock(shared / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return make


@pytest.fixture(scope="module")
def torchao(made_once) -> Iterator[Path]:
    """torchao on the path, here and in processes started here. Not in requirements/cpu.lock: with it, whatever imports
    transformers or vLLM imports it too, which takes seconds, and complains of GPU kernels that a CPU does not have.
    """
    from importlib.machinery import PathFinder

    if PathFinder.find_spec("torchao") is not None:  # not among the modules that are imported: children need the path
        yield Path()
        return

    def fill(folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder / "site"]
        subprocess.run([*command, "torchao==0.18.0"], check=False, capture_output=True, timeout=300)

    site = made_once("torchao", fill) / "site"
    if not site.exists():
        pytest.skip("torchao cannot be installed here")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH")))))
        yield site


@pytest.fixture(scope="session")
def corpus(made_once) -> Path:
    """prose.jsonl and code.jsonl from CPython, cut to some hundred kilobytes."""
    from tinyllama.data import corpus as shipped

    def fill(folder: Path) -> None:
        shipped.write(folder)
        for name, documents in (("prose", 120), ("code", 60)):
            lines = (folder / f"{name}.jsonl").read_text().splitlines(keepends=True)
            short = [line for line in lines if len(line) < 20_000][:documents]
            (folder / f"{name}.jsonl").write_text("".join(short))

    return made_once("corpus", fill)


@pytest.fixture(scope="session")
def tokenizer_model(corpus: Path, made_once) -> Path:
    """A tokenizer.model trained on the corpus."""

    def fill(folder: Path) -> None:
        tinyllama("tokenizer", "train", corpus, "--output", folder / "tokenizer.model", "--vocab-size", VOCAB_SIZE)

    return made_once("tokenizer", fill) / "tokenizer.model"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_model: Path) -> Tokenizer:
    """The same, loaded."""
    from tinyllama.tokenizer.sentencepiece_model import Tokenizer

    return Tokenizer.load(tokenizer_model)


@pytest.fixture(scope="session")
def inputs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prose of the corpus as ten files of every kind."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    folder = tmp_path_factory.mktemp("inputs")
    texts = [json.loads(line)["text"] for line in (corpus / "prose.jsonl").read_text().splitlines()]
    for number in range(10):
        some = texts[number::10]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in some).encode()
        if number % 3 == 0:
            (folder / f"{number}.jsonl.zst").write_bytes(zstandard.compress(lines))
        elif number % 3 == 1:
            pq.write_table(pa.table({"content": some}), folder / f"{number}.parquet")
        else:
            (folder / f"{number}.jsonl.gz").write_bytes(gzip.compress(lines))
    return folder


@pytest.fixture(scope="session")
def unbroken(inputs: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed preparation of `inputs` writes, in shards of 30,000 tokens."""
    from tinyllama.data.prepare import prepare
    from tinyllama.data.store import verify

    store = tmp_path_factory.mktemp("unbroken") / "store"
    prepare([inputs], store, tokenizer, shard_tokens=30_000, workers=0)
    verify(store)
    return content(store)


@pytest.fixture(scope="session")
def stores(corpus: Path, tokenizer_model: Path, made_once) -> Path:
    """A data folder with the stores prose and code, and their tokenizer beside them."""

    def fill(folder: Path) -> None:
        for name in ("prose", "code"):
            arguments = preparing(corpus / f"{name}.jsonl", folder / name, tokenizer_model)
            tinyllama(*arguments, "--validation-fraction", "0.1")

    return made_once("data", fill)


@pytest.fixture(scope="session")
def finished_run(stores: Path, made_once) -> Path:
    """A ZeRO-3 run of the tiny model on two ranks: 9 steps, checkpoints at 3, 6 and 9."""
    return made_once("runs", lambda folder: train(stores, folder / "two-ranks", "training.tokens=6912")) / "two-ranks"


@pytest.fixture(scope="session")
def export(finished_run: Path, made_once) -> Path:
    """The Hugging Face directory of the finished run, fp32."""

    def fill(folder: Path) -> None:
        tinyllama("export", finished_run, "--output", folder / "tiny", "--dtype", "float32")

    return made_once("exports", fill) / "tiny"
