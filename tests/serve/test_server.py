"""`--listen`: the official client against the real server, and a clean end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT
from tiny_llama import build

KEY = "sk-test-of-the-day"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def server(llama, tmp_path_factory):
    """A running `tinyllama serve --listen`: process and base URL."""
    output = tmp_path_factory.mktemp("listen")
    command = [sys.executable, "-m", "tinyllama", "serve", str(llama), "--listen", "127.0.0.1:0", "--eager"]
    environment = {**os.environ, "VLLM_API_KEY": KEY, "NO_COLOR": "1", "COLUMNS": "200"}
    with open(output / "stderr", "w") as errors:
        process = subprocess.Popen([*command, "--output", str(output)], stderr=errors, env=environment, cwd=ROOT)
    deadline = time.monotonic() + 240
    url = None
    while url is None and process.poll() is None and time.monotonic() < deadline:
        url = re.search(r"(http://127\.0\.0\.1:\d+)/v1", (output / "stderr").read_text())
        time.sleep(0.2)
    assert url, (output / "stderr").read_text()
    yield process, url[1]
    if process.poll() is None:
        process.terminate()
        process.wait(60)


def test_the_official_client_and_the_key(server):
    import openai

    _, url = server
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny-llama"]
    answer = client.completions.create(model="tiny-llama", prompt="import string", max_tokens=7, temperature=0)
    assert answer.usage.completion_tokens <= 7
    assert answer.choices[0].finish_reason in ("length", "stop")
    again = client.completions.create(model="tiny-llama", prompt="import string", max_tokens=7, temperature=0)
    assert again.choices[0].text == answer.choices[0].text
    stranger = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.completions.create(model="tiny-llama", prompt="import", max_tokens=1)
    with urllib.request.urlopen(f"{url}/health", timeout=10) as health:
        assert health.status == 200


def test_the_key_is_on_no_command_line(server):
    import psutil

    process, _ = server
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(family) > 2
    assert not any(KEY in " ".join(member.cmdline()) for member in family)


def test_sigterm_ends_it_with_all_its_processes(server):
    import psutil

    process, _ = server
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
