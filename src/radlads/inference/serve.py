"""`radlads serve`: a model folder as an OpenAI-compatible server. Routes and generation are openai_api.py's."""

import argparse
import asyncio
import errno
import importlib.util
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from transformers import GenerationConfig, PreTrainedTokenizerBase

from radlads.checkpoint.model_folder import load_model
from radlads.checkpoint.tokenizer_files import GENERATION_FILE, num_ids
from radlads.convert.hf_source import open_tokenizer
from radlads.inference.chat_template import ChatTemplate, stop_ids
from radlads.inference.generate import choose_device
from radlads.inference.prefill import PREFILL_TOKENS, prefill
from radlads.model.modeling import RadladsForCausalLM

if TYPE_CHECKING:
    import uvicorn

PACKAGES = ("fastapi", "openai", "uvicorn")
SHUTDOWN_S = 3
MAX_PORT = 65535
WILDCARDS = {"", "0.0.0.0", "::"}
KEY_VARIABLE = "RADLADS_API_KEY"


def serve(arguments: argparse.Namespace, notice: Callable[[str], None]) -> None:
    """Serve the folder that add_serve_options' arguments name until Ctrl-C.

    Raises ValueError for a missing package, a port that cannot be had, bounds below 1, and as load_model
    and prefill do.
    """
    _check(arguments)
    with listening(arguments.host, arguments.port) as listener:
        server = build_server(arguments)
        host, port = listener.getsockname()[:2]
        with _naming_address(host, port):  # another process may have bound the port too, and listen by now
            listener.listen()  # a client that reads the next line may connect at once
        notice(f"serving {server_name(arguments)} at http://{host}:{port}/v1 (Ctrl-C ends)")
        with suppress(KeyboardInterrupt):  # uvicorn has shut down and passes the signal on
            server.run(sockets=[listener])


def _check(arguments: argparse.Namespace) -> None:
    for option in ("max_prompt_tokens", "max_tokens", "max_requests"):
        if (value := getattr(arguments, option)) < 1:
            raise ValueError(f"--{option.replace('_', '-')} must be 1 or more, not {value}")
    if arguments.api_key == "":
        raise ValueError("--api-key is empty: give a key, or leave it out")


def build_server(arguments: argparse.Namespace) -> "uvicorn.Server":
    """A server that has its model and waits for a socket. Errors as serve."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(f"serving needs {', '.join(missing)}: pip install 'radlads[serve]'")
    import uvicorn

    from radlads.inference.access import Guard
    from radlads.inference.openai_api import Limits, ServedModel, build_app

    transformers.logging.set_verbosity_error()  # it warns of every request
    logging.getLogger("uvicorn.error").addFilter(_is_worth_a_line)
    device, dtype = choose_device(arguments.device)
    model = load_model(arguments.folder, dtype=dtype, verify=arguments.verify)
    tokenizer = open_tokenizer(arguments.folder, model.config.vocab_size)
    model.generation_config = generation_config(arguments.folder, model, tokenizer)
    model = model.to(device)  # type: ignore[arg-type]
    prefill(model, torch.zeros(1, 1, dtype=torch.int64, device=device))  # broken weights are told now, not to clients
    served = ServedModel(
        server_name(arguments),
        model,
        tokenizer,
        Limits(arguments.max_prompt_tokens, arguments.max_tokens, arguments.max_requests),
    )
    app = Guard(
        build_app(served),
        hosts=[*arguments.allowed_host, *({arguments.host} - WILDCARDS)],
        api_key=arguments.api_key or os.environ.get(KEY_VARIABLE) or None,
    )
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=SHUTDOWN_S)
    return uvicorn.Server(config)


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Not the traceback of a stream that ends because the server does, nor that of a reader too slow being short."""
    if record.getMessage() == "ASGI callable returned without completing response.":
        return False
    return record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)


def server_name(arguments: argparse.Namespace) -> str:
    """What clients call the model."""
    return arguments.name or arguments.folder.resolve().name


def generation_config(folder: Path, model: RadladsForCausalLM, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The folder's generation_config.json, with every id that ends a text or a reply, and long prompts read in pieces.

    Ids that the tokenizer has no token for are never drawn.
    """
    has_file = (folder / GENERATION_FILE).is_file()
    config = GenerationConfig.from_pretrained(folder) if has_file else GenerationConfig()
    stops = ChatTemplate(folder, model.config.vocab_size).stop_ids() if tokenizer.chat_template else stop_ids(folder)
    config.eos_token_id = sorted(stops)
    if config.pad_token_id is None:
        config.pad_token_id = config.eos_token_id[0]
    config.prefill_chunk_size = PREFILL_TOKENS
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
