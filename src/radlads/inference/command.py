"""`radlads generate`: one prompt streamed, or a file of them in batches; and texts whose state is kept in a file."""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from radlads.checkpoint.atomic import check_new
from radlads.checkpoint.model_folder import load_model
from radlads.checkpoint.tokenizer_files import num_ids
from radlads.convert.hf_source import open_tokenizer
from radlads.inference import generate
from radlads.inference.chat_template import stop_ids
from radlads.inference.options import sampling_of
from radlads.inference.prompts import ANSWER_KEYS, batches, checked_text, prompt_ids, read_prompt, read_prompts
from radlads.inference.sampling import Sampling
from radlads.inference.saved_state import ReadText, check_finite, fingerprint, load_state, read_text, save_state
from radlads.model.modeling import RadladsForCausalLM


@dataclass(frozen=True)
class _Model:
    """An open model folder."""

    folder: Path
    model: RadladsForCausalLM
    tokenizer: Tokenizer
    stop_ids: frozenset[int]

    def fingerprint(self) -> str:
        return fingerprint(self.folder, self.model.config)


def generate_text(arguments: argparse.Namespace, notice: Callable[[str], None]) -> Iterator[str]:
    """Yield what add_generate_options' arguments ask for, piece by piece as it comes.

    Raises ValueError for arguments that do not go together, files that are no prompts or no state of this model, and
    as load_model and stream_text do.
    """
    _check(arguments)
    only_saves = arguments.save_state is not None and arguments.max_tokens == 0
    sampling = Sampling() if only_saves else sampling_of(arguments)
    records = read_prompts(arguments.prompts) if arguments.prompts else []
    prompt = _prompt(arguments)
    opened = _open(arguments)
    after = load_state(opened.model, opened.fingerprint(), arguments.load_state) if arguments.load_state else None
    if arguments.save_state:
        after, prompt = _read(opened, prompt, after), ""
        size = save_state(after, opened.fingerprint(), arguments.save_state)
        notice(f"wrote {arguments.save_state}: {after.num_tokens:,} tokens, {size / 1e6:.3g} MB")
    if records:
        yield from _answers(opened, records, sampling, after, arguments.batch_size)
    elif not only_saves:
        pieces = generate.stream_text(opened.model, opened.tokenizer, prompt, sampling, opened.stop_ids, after)
        yield from pieces
        yield "\n"


def _read(opened: _Model, text: str, after: ReadText | None) -> ReadText:
    """The text to be stored, after `after`. Raises NotFinite for one that the model cannot go on from."""
    ids = prompt_ids(opened.tokenizer, text, continues=after is not None)
    read = read_text(opened.model, ids, after)
    check_finite(opened.model, read)
    return read


def _check(arguments: argparse.Namespace) -> None:
    prompts = (arguments.prompt, arguments.prompt_file, arguments.prompts, arguments.load_state)
    if all(given is None for given in prompts):
        raise ValueError("there is nothing to continue: give --prompt, --prompt-file, --prompts or --load-state")
    if arguments.prompts is not None and arguments.save_state is not None:
        raise ValueError("--save-state stores one text: give it with --prompt or --prompt-file, not with --prompts")
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size must be 1 or more, not {arguments.batch_size}")
    if arguments.save_state is not None:
        check_new(arguments.save_state)
    if arguments.save_state is not None and not arguments.save_state.absolute().parent.is_dir():
        raise ValueError(f"{arguments.save_state.parent} is not a folder: make it first")
    if arguments.save_state is not None and not os.access(arguments.save_state.absolute().parent, os.W_OK):
        raise ValueError(f"{arguments.save_state.parent} cannot be written to: choose another folder for --save-state")


def _prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt_file is not None:
        return read_prompt(arguments.prompt_file)
    return checked_text(arguments.prompt or "", "--prompt")


def _open(arguments: argparse.Namespace) -> _Model:
    device, dtype = generate.choose_device(arguments.device)
    model = load_model(arguments.folder, dtype=dtype, verify=arguments.verify).to(device)  # type: ignore[arg-type]
    tokenizer = open_tokenizer(arguments.folder, model.config.vocab_size)
    return _Model(arguments.folder, model, tokenizer._tokenizer, stop_ids(arguments.folder))


def _answers(
    opened: _Model, records: list[dict[str, Any]], sampling: Sampling, after: ReadText | None, rows: int
) -> Iterator[str]:
    """A JSON line for each record, in order: what the record holds, and the text that continues its prompt."""
    continues = after is not None
    prompts = [prompt_ids(opened.tokenizer, record["prompt"], continues=continues) for record in records]
    sampling = replace(sampling, num_ids=num_ids(opened.tokenizer))
    for batch in batches([len(prompt) for prompt in prompts], rows):
        # The seed of a prompt goes by its number in the file, whatever batch it is in
        seed = None if sampling.seed is None else sampling.seed + batch.start
        continuations = generate.generate_tokens(
            opened.model,
            [prompts[index] for index in batch],
            replace(sampling, seed=seed),
            opened.stop_ids,
            after=after,
        )
        for index, tokens in zip(batch, continuations, strict=True):
            reason = "length" if len(tokens) == sampling.max_tokens else "stop"
            text = "".join(generate.decoded(opened.tokenizer, tokens))
            answer = dict(zip(ANSWER_KEYS, (text, len(tokens), reason), strict=True))
            yield json.dumps(records[index] | answer, ensure_ascii=False) + "\n"
