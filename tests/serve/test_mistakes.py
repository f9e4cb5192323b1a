"""What a user gets wrong, each told in one line before vLLM is even imported; and where a model comes from."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, tinyllama
from tiny_llama import build

from serve.bench import Workload, check_kv_cache, cpu_kv_cache_bytes
from serve.cli import serve_command
from serve.engine import logged_reason
from serve.server import command, parse_address
from serve.source import resolve
from tinyllama.errors import UserError


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("models") / "tiny-llama")


def refused(*arguments: object) -> str:
    done = tinyllama("serve", *arguments, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_no_such_model_in_one_line(tmp_path):
    line = refused(tmp_path / "nothing")
    assert line.startswith("error: ")
    assert "nothing does not exist; give an export" in line


def test_not_a_model(tmp_path):
    with pytest.raises(UserError, match="is not a model"):
        resolve(str(tmp_path), print)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="is a file"):
        resolve(str(file), print)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    with pytest.raises(UserError, match="no weights"):
        resolve(str(tmp_path), print)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="no tokenizer"):
        resolve(str(tmp_path), print)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        resolve(str(tmp_path), print)


def test_an_activation_that_vllm_lacks_is_refused_before_it_is_loaded(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "model")
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    with pytest.raises(UserError, match="hidden_act 'gelu': vLLM's Llama computes silu alone"):
        resolve(str(tmp_path / "model"), print)


def test_weights_that_vllm_alone_would_read_are_refused(llama, tmp_path):
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    shutil.copy(model / "model.safetensors", model / "consolidated.00.safetensors")
    with pytest.raises(UserError, match="vLLM would read consolidated"):
        resolve(str(model), print)


def test_port_in_use(llama):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} is in use" in refused(llama, "--listen", f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    "address", ["nonsense", "127.0.0.1:", "127.0.0.1:70000", "127.0.0.1:-1", "256.1.1.1:80", "\udcff:80"]
)
def test_unusable_address(address):
    with pytest.raises(UserError, match="--listen"):
        parse_address(address)


def test_addresses_are_loopback_unless_said_otherwise():
    for text in ("0", ":0", "127.0.0.1:0", "localhost:0"):
        host, port = parse_address(text)
        assert host in ("127.0.0.1", "localhost")
        assert port > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-sizes", "1,two"], "--batch-sizes 1,two"),
        (["--batch-sizes", "0"], "--batch-sizes 0"),
        (["--batch-sizes", "4,4"], "--batch-sizes 4,4"),
        (["--repeats", "0"], "--repeats 0"),
        (["--output-tokens", "0"], "--output-tokens 0"),
        (["--dtype", "int3"], "--dtype int3"),
        (["--kv-cache-gib", "-1"], "--kv-cache-gib -1"),
        (["--input-tokens", "200", "--output-tokens", "100"], "= 300 exceeds the model's context of 256"),
        (["--max-model-len", "100"], "= 128 exceeds --max-model-len of 100"),
        (["--max-model-len", "4096"], "exceeds the model's context of 256"),
        (["--lengths", "8x8,200x100"], "--lengths 200x100: 200 + 100 = 300 exceeds the model's context of 256"),
        (["--lengths", "64"], "--lengths 64"),
        (["--lengths", "0x8"], "--lengths 0x8"),
        (["--samples", "0"], "--samples 0"),
        (["--preset", "tinylama-a40"], "did you mean tinyllama-a40?"),
        (["--measure", "offlin"], "--measure offlin"),
        (["--rates", "fast"], "--rates fast"),
        (["--concurrency", "0"], "--concurrency 0"),
        (["--rates", "", "--concurrency", ""], "--rates and --concurrency are both empty"),
        (["--slo", "p99=3"], "'p99=3' is no objective"),
        (["--measure", "offline", "--slo", "ttft=3"], "--slo and --find-max-rate are about latency under load"),
        (["--find-max-rate"], "--find-max-rate without --slo"),
        (["--bandwidth-gb-per-s", "0"], "--bandwidth-gb-per-s 0"),
    ],
)
def test_impossible_workloads(llama, arguments, message):
    import typer
    from typer.testing import CliRunner

    app = typer.Typer()
    app.command()(serve_command)
    found = CliRunner().invoke(app, [str(llama), *arguments]).exception
    assert isinstance(found, UserError)
    assert message in str(found)


def test_too_little_memory_says_how_much(llama):
    source = resolve(str(llama), print)
    with pytest.raises(UserError, match=r"needs .* GiB, .* GiB of memory are free, .* GiB are missing"):
        cpu_kv_cache_bytes(source, None, None, sequences=10**9, tokens=128)


def test_a_kv_cache_too_small_says_how_much_and_which_option(llama):
    source = resolve(str(llama), print)
    needed = 2 * 2 * 64 * 2 * 256  # layers, K and V, head_dim, bytes, context
    with pytest.raises(UserError, match=r"256 tokens needs .* GiB, .* GiB are missing; raise --kv-cache-gib, or lower"):
        check_kv_cache(source, None, None, needed - 1)
    check_kv_cache(source, None, None, needed)
    check_kv_cache(source, None, 255, needed - 1)


def test_missing_vllm_names_the_extra():
    # -S: without site-packages, so that vllm is really not there
    code = "from serve.engine import require_vllm; require_vllm()"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(r"MissingExtraError: vllm is not installed; pip install 'tinyllama\[(cpu|gpu)\]'", last)


def test_longest_request_that_fits_is_accepted(llama):
    Workload(input_tokens=200, output_tokens=56).fits(resolve(str(llama), print), None)


def test_server_command_line_uses_vllms_option_names():
    from serve.engine import EngineConfig

    config = EngineConfig("m", 8, "bfloat16", 128, 2**20, eager=True)
    line = command(config, "name", "127.0.0.1", 1)
    assert line[0] == sys.executable
    text = " ".join(line)
    assert "--enforce-eager" in line
    assert "--kv-cache-memory-bytes 1048576" in text
    assert "--max-model-len 128" in text


def test_the_reason_in_a_log_is_an_error_and_no_warning(tmp_path):
    log = tmp_path / "server.log"
    log.write_text(
        "(APIServer pid=1) WARNING 11-26 03:28:24 [system_utils.py:255] It can cause `OSError: [Errno 24] Too many`\n"
        "(EngineCore pid=2) ERROR 11-26 03:28:25 [core.py:1] ValueError: the KV cache is too small\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert logged_reason(log) == "ValueError: the KV cache is too small"
    log.write_text("(APIServer pid=1) INFO 11-26 03:28:24 [a.py:1] no Error: here\n")
    assert logged_reason(log) is None


def test_a_checkpoint_is_exported_once_and_again_when_the_export_was_changed(finished_run, tmp_path):
    from tinyllama.export import content_sha256

    run = tmp_path / finished_run.name
    shutil.copytree(finished_run, run)
    said: list[str] = []
    first = resolve(str(run), said.append)
    assert first.name == f"{run.name}-step-00000009"
    assert first.record["step"] == 9
    assert first.describe()["content_sha256"] == content_sha256(first.location)
    second = resolve(str(run / "checkpoints" / "step-00000009"), said.append)
    assert (second.location, second.record) == (first.location, first.record)
    assert [line.split()[0] for line in said] == ["exporting", "using"]

    config = Path(first.location) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rope_theta": 5.0}))
    third = resolve(str(run), said.append)
    assert said[-1].startswith("exporting")
    assert third.config["rope_theta"] == first.config["rope_theta"]
    assert resolve(str(run / "checkpoints" / "step-00000003"), said.append).location != first.location
