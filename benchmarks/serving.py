"""Time `radlads serve`'s engine through HTTP: one stream against many, in turns, from a process of its own.

    python benchmarks/serving.py [--size 7b | --folder DIR] [--streams 1 32] [--tokens 512] [--repeats 3] [--json FILE]

Random weights of the given size, or a model folder; the clock runs from the first request to the last token. `steady`
counts only while all streams are being decoded. `decode` is `radlads generate`'s step for as many rows, without HTTP
and without prompts. First-token times are from the client's request.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import uvicorn
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from radlads.bench.models import random_model
from radlads.checkpoint.model_folder import load_model
from radlads.convert.hf_source import open_tokenizer
from radlads.inference import serve
from radlads.inference.batching.metrics import Metrics
from radlads.inference.generate import choose_device, decode_ms
from radlads.inference.openai_api import Desk, Limits, ServedModel, build_app
from radlads.model.configuration import RadladsConfig

SIZES = {
    "tiny": {
        **{"vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 2},
    },
    "7b": {
        **{"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
        **{"num_attention_heads": 28, "num_key_value_heads": 4},
    },
}
SAMPLE_S = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--folder", type=Path, metavar="DIR")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=256, help="of each answer")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="about as many")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--client", metavar="PORT", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client:
        print(json.dumps(asyncio.run(ask_all(arguments))))
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = measure(arguments)
    if arguments.json:
        before = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
        arguments.json.write_text(json.dumps(before + rows, indent=1) + "\n")


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of streams: medians over the repeats, in which the numbers take turns."""
    desk_model = served_model(arguments, max_concurrent=max(arguments.streams))
    bare = {streams: decode_tokens_per_s(desk_model, streams) for streams in arguments.streams}
    desk, found = Desk(desk_model), {streams: [] for streams in arguments.streams}
    samples = Samples(desk.engine.metrics)
    with serve.listening("127.0.0.1", 0) as listener, serve.quick_switching():
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(build_app(desk), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        port = listener.getsockname()[1]
        client(arguments, port, max(arguments.streams))  # what is compiled or allocated at its first use
        for _ in range(arguments.repeats):
            for streams in arguments.streams:
                found[streams].append(with_steady(client(arguments, port, streams), samples))
        server.should_exit = True
        thread.join()
    samples.stop.set()
    rows = [summary(streams, runs, bare[streams], desk_model) for streams, runs in found.items()]
    for row in rows:
        print(row, flush=True)
    return rows


def summary(streams: int, runs: list[dict[str, Any]], bare: float, served: ServedModel) -> dict[str, Any]:
    row: dict[str, Any] = {"streams": streams, "device": str(served.model.device), "decode_tokens_per_s": round(bare)}
    for name in ("tokens_per_s", "steady_tokens_per_s", "first_token_s", "last_first_token_s"):
        values = sorted(run[name] for run in runs)
        row[name] = round(statistics.median(values), 3)
        row[f"{name}_range"] = [round(values[0], 3), round(values[-1], 3)]
    return row | {"share_of_decode": round(row["steady_tokens_per_s"] / bare, 3)}


def served_model(arguments: argparse.Namespace, max_concurrent: int) -> ServedModel:
    """The folder's model, or one of random weights with a tokenizer of as many words as it has tokens."""
    device, dtype = choose_device(arguments.device)
    limits = Limits(max_concurrent=max_concurrent)
    if arguments.folder:
        model = load_model(arguments.folder, dtype=dtype).to(device)
        tokenizer = open_tokenizer(arguments.folder, model.config.vocab_size)
        model.generation_config = serve.generation_config(arguments.folder, model, tokenizer)
        return ServedModel("model", model, tokenizer, limits)
    torch.manual_seed(0)
    config = RadladsConfig(**SIZES[arguments.size], balance_state=False, groupnorm_att=True)
    model = random_model(config, device=device, dtype=dtype)
    words = Tokenizer(models.WordLevel({f"w{number} ": number for number in range(config.vocab_size)}, unk_token="w0 "))
    words.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    model.generation_config = GenerationConfig(pad_token_id=0)
    return ServedModel("model", model, PreTrainedTokenizerFast(tokenizer_object=words), limits)


def decode_tokens_per_s(served: ServedModel, rows: int) -> float:
    tokens = torch.randint(served.model.config.vocab_size, (rows, 64), device=served.model.device)
    return 1000 * rows / decode_ms(served.model, tokens)


class Samples:
    """How many tokens had come, at moments SAMPLE_S apart."""

    def __init__(self, metrics: Metrics):
        self.stop, self._metrics, self.taken = threading.Event(), metrics, [(time.perf_counter(), 0)]
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        while not self.stop.wait(SAMPLE_S):
            self.taken.append((time.perf_counter(), self._metrics.num_tokens))

    def between(self, began_s: float, ended_s: float) -> float:
        """Tokens per second."""
        inside = [sample for sample in self.taken if began_s <= sample[0] <= ended_s]
        if len(inside) < 2:
            return float("nan")
        return (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])


def with_steady(run: dict[str, Any], samples: Samples) -> dict[str, Any]:
    return run | {"steady_tokens_per_s": samples.between(run["all_began"], run["first_ended"])}


def client(arguments: argparse.Namespace, port: int, streams: int) -> dict[str, Any]:
    """One round of requests, from another process: this one's interpreter is the server's."""
    command = [sys.executable, __file__, "--client", str(port), "--streams", str(streams)]
    command += ["--tokens", str(arguments.tokens), "--prompt-tokens", str(arguments.prompt_tokens)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


async def ask_all(arguments: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    streams = arguments.streams[0]
    answers = await asyncio.gather(*(ask(arguments, number) for number in range(streams)))
    seconds = time.perf_counter() - began
    first_tokens = [first - began for first, _, _ in answers]
    return {
        "tokens_per_s": sum(count for _, _, count in answers) / seconds,
        "first_token_s": statistics.median(first_tokens),
        "last_first_token_s": max(first_tokens),
        "all_began": max(first for first, _, _ in answers),
        "first_ended": min(ended for _, ended, _ in answers),
    }


async def ask(arguments: argparse.Namespace, number: int) -> tuple[float, float, int]:
    """One stream: when its first text came, when its last, and its number of tokens."""
    prompt = "".join(f"w{(number * 7 + place) % 200} " for place in range(arguments.prompt_tokens))
    body = json.dumps({"prompt": prompt, "max_tokens": arguments.tokens, "temperature": 0, "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", arguments.client)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + body)
    first, last, usage = 0.0, 0.0, None
    async for line in reader:
        if line.startswith(b"data: {"):
            first, last = first or time.perf_counter(), time.perf_counter()
            if b'"usage"' in line:
                usage = json.loads(line[6:])["usage"]["completion_tokens"]
    writer.close()
    if usage is None:
        raise SystemExit("an answer did not come to its end")
    return first, last, usage


if __name__ == "__main__":
    main()
