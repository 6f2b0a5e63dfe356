"""What a stage trains and is measured on: samples of its corpora, for each process its own."""

import math
from collections.abc import Iterable
from fractions import Fraction

import torch
from torch.utils.data import DataLoader

from radlads.config.schema import Config, TrainConfig, stage_of
from radlads.data.binidx import BinIdxReader, TokenSpan
from radlads.data.chat_rows import ConversationRows, Conversations
from radlads.data.loader import HeldoutWindows, MixedSamples, TokenSamples, check_vocabulary
from radlads.data.mixture import parse_mixture
from radlads.distill.documents import document_ends
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.corpora.watched_corpora import WatchedCorpora
from radlads.train.processes.group import ALONE, Processes

Samples = TokenSamples | MixedSamples | ConversationRows


def training_samples(config: Config, vocab_size: int, processes: Processes = ALONE) -> tuple[Samples, int]:
    """This process's samples, whole accumulation windows of them, and the stage's number of optimiser steps."""
    train, context = config.train, config.model.ctx_len
    corpora = open_corpora(train)
    for reader, _ in corpora:
        check_vocabulary(reader, vocab_size, f"{reader.path_stem}.bin")
    if stage_of(train) == "instruct":
        return _conversations(config, corpora, processes)
    num_tokens = sum(reader.num_tokens for reader, _ in corpora) - train.heldout_tail_tokens
    tokens_per_step = sequences_per_step(train, processes) * context
    num_steps = steps_of(train.my_exit_tokens or num_tokens, tokens_per_step)
    num_samples = num_steps * train.micro_bsz * train.accumulate_grad_batches
    own = {"rank": processes.rank, "world": processes.size}
    prime = 0 if train.magic_prime == "auto" else train.magic_prime
    if len(corpora) == 1:
        reader = corpora[0][0]
        kept = TokenSpan(reader, 0, _tail_start(reader, train.heldout_tail_tokens))
        return TokenSamples(kept, context, num_samples=num_samples, magic_prime=prime, **own), num_steps
    if prime:
        raise ValueError("train.magic_prime belongs to one corpus: set it to auto where train.data_file names several")
    return MixedSamples(corpora, context, num_samples=num_samples, **own), num_steps


def _conversations(
    config: Config, corpora: list[tuple[BinIdxReader, Fraction]], processes: Processes
) -> tuple[ConversationRows, int]:
    """As training_samples, for the instruct stage: without a budget, as many rows as conversations fill."""
    train, context = config.train, config.model.ctx_len
    held = [(Conversations(reader, context), share) for reader, share in corpora]

    def rows(num_steps: int) -> ConversationRows:
        return ConversationRows(
            held,
            context,
            num_samples=num_steps * train.micro_bsz * train.accumulate_grad_batches,
            seed=train.seed_everything,
            rank=processes.rank,
            world=processes.size,
            on_policy_share=Fraction(train.on_policy_share).limit_denominator(1000),
        )

    budget = train.my_exit_tokens or rows(1).rows_in_epoch * context
    num_steps = steps_of(budget, sequences_per_step(train, processes) * context)
    return rows(num_steps), num_steps


def steps_of(budget_tokens: int, tokens_per_step: int) -> int:
    """Optimiser steps until the budget is spent: the last one may go past it, as in the released code."""
    return math.ceil(budget_tokens / tokens_per_step)


def sequences_per_step(train: TrainConfig, processes: Processes = ALONE) -> int:
    """Rows of all processes that one optimiser step is made of."""
    return train.micro_bsz * train.accumulate_grad_batches * processes.size


def ends_of_documents(config: Config, *models: RadladsForCausalLM | None) -> tuple[int, ...]:
    """The tokens that end a document, where the configuration asks for documents."""
    train = config.train
    if not (train.mask_labels_at_eos or train.reset_state_at_eos):
        return ()
    configs = [model.config for model in models if model is not None]
    return document_ends(train, configs, [reader for reader, _ in open_corpora(train)])


def open_corpora(train: TrainConfig) -> list[tuple[BinIdxReader, Fraction]]:
    """The corpora to train on, and their shares of the samples."""
    if not train.data_file:
        raise ValueError("train.data_file is not set: name the .bin/.idx pair to train on, without the extension")
    return [(BinIdxReader(path), share) for path, share in parse_mixture(train.data_file)]


def open_heldout(train: TrainConfig) -> BinIdxReader | None:
    """The corpus that train.validation_data_file names, or None. Raises ValueError if it names several."""
    return _one_corpus(train.validation_data_file) if train.validation_data_file else None


def heldout_batches(config: Config, vocab_size: int) -> Iterable[torch.Tensor] | None:
    """Batches of held-out windows, or None if the configuration names no held-out tokens."""
    if not _holds_out(config.train):
        return None
    reader = open_heldout(config.train) or _one_corpus(config.train.data_file)
    windows = _heldout_windows(config, reader, vocab_size)
    return DataLoader(WatchedCorpora(windows, [reader]), batch_size=config.train.micro_bsz)


def selection_windows(config: Config, vocab_size: int) -> tuple[HeldoutWindows, str]:
    """The windows that layers are selected on, as many tokens as are held out, and what they are: the held-out ones, or
    without such the first of the training text."""
    train = config.train
    if _holds_out(train):
        reader = open_heldout(train) or _one_corpus(train.data_file)
        return _heldout_windows(config, reader, vocab_size), f"held-out text of {reader.path_stem}.bin"
    reader, _ = open_corpora(train)[0]
    return _heldout_windows(config, reader, vocab_size), f"the start of the training text, {reader.path_stem}.bin"


def _heldout_windows(config: Config, reader: BinIdxReader, vocab_size: int) -> HeldoutWindows:
    train, context = config.train, config.model.ctx_len
    check_vocabulary(reader, vocab_size, f"{reader.path_stem}.bin")
    first = _tail_start(reader, train.heldout_tail_tokens) if train.heldout_tail_tokens else 0
    return HeldoutWindows(TokenSpan(reader, first, reader.num_tokens), context, max(train.heldout_tokens, context))


def runs_teacher(config: Config) -> bool:
    """Whether the stage runs a teacher that it is given: to learn from, or for its held-out measurements."""
    train = config.train
    return stage_of(train) != "extend" or train.teacher.kl_weight > 0 or _holds_out(train)


def _holds_out(train: TrainConfig) -> bool:
    return bool(train.validation_data_file or train.heldout_tail_tokens)


def _one_corpus(text: str) -> BinIdxReader:
    corpora = parse_mixture(text)
    if len(corpora) > 1:
        raise ValueError("held-out tokens come from one corpus: name it as train.validation_data_file")
    return BinIdxReader(corpora[0][0])


def _tail_start(reader: BinIdxReader, tail_tokens: int) -> int:
    """Where the held-out tokens at the end begin."""
    if tail_tokens >= reader.num_tokens:
        raise ValueError(
            f"train.heldout_tail_tokens {tail_tokens} takes all {reader.num_tokens} tokens of {reader.path_stem}.bin: "
            "hold out fewer"
        )
    return reader.num_tokens - tail_tokens
