"""`radlads data write`: a teacher answers prompts, and its conversations become a corpus with a mask."""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from radlads.checkpoint.atomic import partial_name
from radlads.checkpoint.manifest import weights_hash
from radlads.console import Console
from radlads.convert.hf_source import TeacherSource, open_teacher
from radlads.convert.student import build_teacher
from radlads.data.binidx import BinIdxReader, corpus_files, corpus_stem
from radlads.data.build_chat import Rendered, describe_mask, write_chat
from radlads.data.conversations import Conversation
from radlads.inference.chat_template import ChatTemplate
from radlads.inference.generate import choose_device
from radlads.inference.sampling import Sampling
from radlads.inference.writing.journal import Journal, open_journal
from radlads.inference.writing.prompts import read_beginnings
from radlads.inference.writing.replies import Reply, fitting_rows, reply_sampling, write_replies
from radlads.model.modeling import RadladsForCausalLM

# So many replies, none of which ends by itself, and the teacher is taken for one that never ends
_ENDLESS = 32


@dataclass(frozen=True)
class Written:
    """Replies by what became of them."""

    kept: int
    endless: int
    empty: int

    def __str__(self) -> str:
        left_out = f"{self.endless:,} that did not end within --max-tokens, {self.empty:,} empty"
        return f"{self.kept:,} replies; left out: {left_out}"


def write_lines(arguments: argparse.Namespace, console: Console) -> Iterator[str]:
    """Do what add_write_options' arguments ask for, and say what came of it. Raises ValueError as write_corpus."""
    if arguments.answers < 1 or (arguments.batch_size is not None and arguments.batch_size < 1):
        raise ValueError("--answers and --batch-size must be 1 or more")
    sampling = Sampling(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
    )
    beginnings = read_beginnings(arguments.prompts, system=arguments.system)[: arguments.max_prompts]
    device, dtype = choose_device(arguments.device)
    source = open_teacher(arguments.teacher)
    template = ChatTemplate(source.folder, source.config.vocab_size)
    _check_new(arguments.out)
    teacher = build_teacher(source).to(device, dtype)  # type: ignore[arg-type]
    written = write_corpus(
        Teacher(source, teacher, template),
        beginnings,
        arguments.out,
        sampling,
        console,
        answers=arguments.answers,
        rows=arguments.batch_size,
    )
    reader = BinIdxReader(arguments.out)
    yield f"{reader.path_stem}: {reader.num_tokens:,} tokens, {written}"
    yield from describe_mask(reader)


@dataclass(frozen=True)
class Teacher:
    """A model that answers, where it comes from, and how it is talked to."""

    source: TeacherSource
    model: RadladsForCausalLM
    template: ChatTemplate


def write_corpus(
    teacher: Teacher,
    beginnings: Sequence[Conversation],
    out: Path,
    sampling: Sampling,
    console: Console,
    *,
    answers: int = 1,
    rows: int | None = None,
) -> Written:
    """Have the teacher answer each beginning `answers` times, into out.bin, .idx and .mask.

    Goes on, token by token, with what a killed run of the same request has left in out.partial. Replies that are empty
    or do not end by themselves are left out. Raises ValueError if the corpus exists, for a request that does not go
    with what was left, if memory is too small, and for a teacher that never ends a reply.
    """
    stem, template = corpus_stem(out), teacher.template
    _check_new(stem)
    prompts = [template.token_ids(each.messages, each.tools) for each in beginnings]
    replies = [Reply(number, prompts[number // answers]) for number in range(answers * len(prompts))]
    sampling = reply_sampling(sampling, template.vocab_size)
    request = (
        asdict(sampling)
        | {
            "answers": answers,
            "max_tokens": "any",  # replies that lack some go on
            "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
            "teacher": weights_hash(teacher.source.folder)[:16],
        }
    )
    longest = max(map(len, prompts)) + sampling.max_tokens
    rows = fitting_rows(teacher.model, longest, rows)
    with open_journal(stem, request, replies) as journal:
        if journal.num_tokens:
            console.line(f"going on after {journal.num_tokens:,} tokens, from {partial_name(stem)}")
        never_ends = partial(_never_ends, max_tokens=sampling.max_tokens, template=template)
        progress = _Progress(replies, sampling.max_tokens, console, journal, never_ends)
        for step in write_replies(teacher.model, replies, sampling, template.stop_ids(), rows=rows):
            journal.add(step)
            progress.note(step)
        done = [reply for reply in replies if reply.has_ended and reply.tokens]
        empty = sum(reply.has_ended and not reply.tokens for reply in replies)
        if not done:
            raise ValueError(never_ends(len(replies)))
        write_chat((_document(reply, template.turn_end()) for reply in done), stem, vocab_size=template.vocab_size)
    return Written(len(done), len(replies) - len(done) - empty, empty)


def _document(reply: Reply, turn_end: int) -> Rendered:
    own = [*reply.tokens, turn_end]
    return Rendered([*reply.prompt, *own], [False] * len(reply.prompt) + [True] * len(own))


def _check_new(stem: Path) -> None:
    for path in corpus_files(corpus_stem(stem)):
        if path.exists():
            raise ValueError(f"{path} exists already: remove it, or choose another --out")


def _never_ends(num: int, max_tokens: int, template: ChatTemplate) -> str:
    names = [template.tokenizer.convert_ids_to_tokens(number) for number in sorted(template.stop_ids())]
    by = " or ".join(map(repr, names))
    return (
        f"none of the teacher's first {num:,} replies ended within {max_tokens:,} tokens, by {by}: raise --max-tokens, "
        "lower --temperature, or take an instruct model, with its own template and generation_config.json"
    )


class _Progress:
    """Says how far the replies are, and raises ValueError once many are done and none has ended by itself."""

    def __init__(
        self,
        replies: Sequence[Reply],
        max_tokens: int,
        console: Console,
        journal: Journal,
        never_ends: Callable[[int], str],
    ):
        self._replies, self._max_tokens, self._console, self._journal = replies, max_tokens, console, journal
        self._never_ends = never_ends
        self._done = sum(reply.is_done(max_tokens) for reply in replies)
        self._ended = sum(reply.has_ended for reply in replies)
        self._began, self._begun_with, self._done_before = time.monotonic(), journal.num_tokens, self._done

    def note(self, step: Sequence[tuple[Reply, int | None]]) -> None:
        """Count a step."""
        self._ended += sum(token is None for _, token in step)
        self._done += sum(reply.is_done(self._max_tokens) for reply, _ in step)
        if self._done >= min(_ENDLESS, len(self._replies)) and not self._ended:
            raise ValueError(self._never_ends(self._done))
        self._console.progress(self._line(time.monotonic() - self._began))

    def _line(self, seconds: float) -> str:
        num, tokens = len(self._replies), self._journal.num_tokens
        speed = (tokens - self._begun_with) / max(seconds, 1e-9)
        line = f"{self._done:,} of {num:,} replies ({self._done / num:.0%}), {tokens:,} tokens ({speed:,.0f}/s)"
        if self._done == self._done_before or not self._done:
            return line
        # Of those that are done; those on their way are taken for half done
        left_s = seconds * (num - self._done) / (self._done - self._done_before)
        return f"{line}, {left_s // 60:.0f} min {left_s % 60:.0f} s left"
