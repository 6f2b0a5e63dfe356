"""`radlads serve`: a model folder as an OpenAI-compatible server. Routes and generation are openai_api.py's."""

import argparse
import asyncio
import errno
import importlib.util
import logging
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from transformers import GenerationConfig, PreTrainedTokenizerBase

from radlads.checkpoint.model_folder import load_model
from radlads.checkpoint.tokenizer_files import GENERATION_FILE, num_ids
from radlads.convert.hf_source import open_tokenizer
from radlads.inference.batching.row_sampling import not_applied
from radlads.inference.chat_template import ChatTemplate, stop_ids
from radlads.inference.generate import choose_device
from radlads.inference.prefill import prefill
from radlads.model.modeling import RadladsForCausalLM

if TYPE_CHECKING:
    import uvicorn

PACKAGES = ("fastapi", "openai", "uvicorn")
SHUTDOWN_S = 3
SWITCH_S = 2e-4
WARM_TOKENS = 64
MAX_PORT = 65535
WILDCARDS = {"", "0.0.0.0", "::"}
KEY_VARIABLE = "RADLADS_API_KEY"


def serve(arguments: argparse.Namespace, notice: Callable[[str], None]) -> None:
    """Serve the folder that add_serve_options' arguments name until Ctrl-C or SIGTERM.

    Raises ValueError for a missing package, a port that cannot be had, bounds below 1, and as load_model
    and prefill do.
    """
    _check(arguments)
    with listening(arguments.host, arguments.port) as listener:
        server = build_server(arguments, notice)
        host, port = listener.getsockname()[:2]
        with _naming_address(host, port):  # another process may have bound the port too, and listen by now
            listener.listen()  # a client that reads the next line may connect at once
        notice(f"serving {server_name(arguments)} at http://{host}:{port}/v1 (Ctrl-C ends)")
        with quick_switching():
            server.run(sockets=[listener])


def _check(arguments: argparse.Namespace) -> None:
    for option in ("max_prompt_tokens", "max_tokens", "max_concurrent", "prefill_piece"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} must be 1 or more, not {value}")
    for option in ("max_queue", "grace_seconds"):
        if not 0 <= (value := getattr(arguments, option)) < math.inf:
            raise ValueError(f"--{option.replace('_', '-')} must be 0 or more, not {value}")
    if arguments.state_memory is not None and not 0 < arguments.state_memory < math.inf:
        raise ValueError(f"--state-memory must be above 0 GB, not {arguments.state_memory}")
    if arguments.api_key == "":
        raise ValueError("--api-key is empty: give a key, or leave it out")


def build_server(arguments: argparse.Namespace, notice: Callable[[str], None] = lambda text: None) -> "uvicorn.Server":
    """A server that has its model and waits for a socket. Errors as serve.

    notice: takes a sentence about settings of the model that are not applied.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(f"serving needs {', '.join(missing)}: pip install 'radlads[serve]'")
    import uvicorn

    from radlads.inference.access import Guard
    from radlads.inference.graceful_server import GracefulServer
    from radlads.inference.openai_api import Desk, Limits, ServedModel, build_app

    transformers.logging.set_verbosity_error()  # it warns of every request
    logging.getLogger("uvicorn.error").addFilter(_is_worth_a_line)
    device, dtype = choose_device(arguments.device)
    model = load_model(arguments.folder, dtype=dtype, verify=arguments.verify)
    tokenizer = open_tokenizer(arguments.folder, model.config.vocab_size)
    model.generation_config = generation_config(arguments.folder, model, tokenizer)
    model = model.to(device)  # type: ignore[arg-type]
    # Broken weights are told now, not to clients; and kernels are compiled before the first one waits for them
    prefill(model, torch.zeros(1, WARM_TOKENS, dtype=torch.int64, device=device))
    if ignored := not_applied(model.generation_config):
        notice(f"warning: {GENERATION_FILE} sets {', '.join(ignored)}, which serve does not apply")
    limits = Limits(
        prompt_tokens=arguments.max_prompt_tokens,
        answer_tokens=arguments.max_tokens,
        waiting=arguments.max_queue,
        max_concurrent=arguments.max_concurrent,
        piece_tokens=arguments.prefill_piece,
        state_bytes=None if arguments.state_memory is None else int(arguments.state_memory * 1e9),
    )
    desk = Desk(ServedModel(server_name(arguments), model, tokenizer, limits))
    app = Guard(
        build_app(desk),
        hosts=[*arguments.allowed_host, *({arguments.host} - WILDCARDS)],
        api_key=arguments.api_key or os.environ.get(KEY_VARIABLE) or None,
    )
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=SHUTDOWN_S)
    return GracefulServer(config, desk, grace_s=arguments.grace_seconds)


@contextmanager
def quick_switching() -> Iterator[None]:
    """Have Python change threads often: the engine's gives way to the event loop at each operation of torch, and would
    then wait for 5 ms, which is as long as a step."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Not the traceback of a stream that ends because the server does, nor that of a reader too slow being short."""
    if record.getMessage() == "ASGI callable returned without completing response.":
        return False
    return record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)


def server_name(arguments: argparse.Namespace) -> str:
    """What clients call the model."""
    return arguments.name or arguments.folder.resolve().name


def generation_config(folder: Path, model: RadladsForCausalLM, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The folder's generation_config.json, with every id that ends a text or a reply.

    Ids that the tokenizer has no token for are never drawn.
    """
    has_file = (folder / GENERATION_FILE).is_file()
    config = GenerationConfig.from_pretrained(folder) if has_file else GenerationConfig()
    stops = ChatTemplate(folder, model.config.vocab_size).stop_ids() if tokenizer.chat_template else stop_ids(folder)
    config.eos_token_id = sorted(stops)
    if config.pad_token_id is None:
        config.pad_token_id = config.eos_token_id[0]
    padding = range(num_ids(tokenizer._tokenizer), model.config.vocab_size)
    config.suppress_tokens = sorted({*(config.suppress_tokens or ()), *padding}) or None
    return config


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound before the model is loaded, so that a port in use is known at once.

    Raises ValueError for a port or address that cannot be had.
    """
    if not 0 <= port <= MAX_PORT:  # getaddrinfo would take what is left of it after 16 bits
        raise ValueError(f"--port must be from 0 to {MAX_PORT}, not {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{host}:{port} is no address to serve at: {error}") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with _naming_address(host, port):
            listener.bind(address)
        yield listener


@contextmanager
def _naming_address(host: str, port: int) -> Iterator[None]:
    """Have an OSError come out as a ValueError that names the port."""
    try:
        yield
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        reason = "is in use: choose another --port" if taken else f"cannot be had: {error}"
        raise ValueError(f"port {port} at {host} {reason}") from error
