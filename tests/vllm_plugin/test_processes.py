"""vLLM in several processes: heads shared out over two workers, and its OpenAI server with many clients."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import engines
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: run make test-vllm")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SOURCE = Path(__file__).parents[2] / "src"
MODEL = {
    "num_hidden_layers": 4,
    "time_mixers": ["rad_rwkv7", "qwen2", "rad_rwkv6", "rad_rwkv7"],
    "mixer_settings": {"rad_rwkv7": {"window_tokens": 16, "sink_tokens": 2}},
    "groupnorm_att": True,
    "balance_state": False,
    "qk_norm": True,
}


@pytest.mark.parametrize("gate", [1, 2])
def test_tokens_of_two_workers(gate, tmp_path):
    folder = engines.write_model(tmp_path, **MODEL, gate_rank_type=gate)
    with engines.engine(folder, tensor_parallel_size=2, enable_prefix_caching=True) as llm:
        expected = engines.expected(folder)
        assert engines.generate(llm) == expected
        assert engines.generate(llm) == expected


def test_eight_clients_of_the_server(tmp_path):
    folder = engines.write_model(tmp_path, **MODEL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--dtype float32 --enforce-eager --max-num-batched-tokens 128 --kv-cache-memory-bytes {1 << 26}".split()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *options]
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = tmp_path / "server.log"
    with open(log, "w") as output:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], env=environment, stdout=output, stderr=output
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        with ThreadPoolExecutor(8) as clients:
            found = list(clients.map(lambda ids: completion(port, str(folder), ids), engines.prompts()))
    finally:
        server.terminate()
        server.wait(60)
    assert found == engines.expected(folder)


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    while server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])


def completion(port: int, model: str, ids: list[int]) -> list[int]:
    asked = {"model": model, "prompt": ids, "max_tokens": engines.NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(asked | {"return_token_ids": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)["choices"][0]["token_ids"]
