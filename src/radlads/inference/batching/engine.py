"""What generates texts for a server: one thread that owns the model and answers many requests at the same time.

In each turn it reads pieces of prompts, then takes one step for all texts that are being decoded. Knows nothing of
HTTP: a Job goes in, its Generation hands out text as it comes. Leaves who is next to the scheduler, states to the
slots and the choice of tokens to the sampler.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from radlads.inference.batching.answers import AnswerText, Deliveries, Generation, Job, Stopped
from radlads.inference.batching.metrics import Metrics
from radlads.inference.batching.row_sampling import RowSampler, rules_of
from radlads.inference.batching.scheduler import Piece, Scheduler
from radlads.inference.batching.slots import build_slots, bytes_of_text, grows
from radlads.inference.decoder import NOT_FINITE, STEPS_AHEAD, Sent
from radlads.inference.finite import NotFinite, are_finite
from radlads.inference.generate import available_bytes
from radlads.inference.prefill import left_padded
from radlads.model.cache import RadladsCache
from radlads.model.modeling import RadladsForCausalLM

# Of a CPU and of a GPU: a piece holds the others up for as long as it takes to read
ROWS = {"cpu": 16, "cuda": 32}
PIECE_TOKENS = {"cpu": 128, "cuda": 512}
# Of the free memory, for states: the rest is for what reading a piece needs
STATE_SHARE = 0.5


class _Answer:
    """A job on its way. num_chosen: tokens that the device was told to choose; num_told: those known here."""

    def __init__(self, job: Job, generation: Generation, tokenizer: PreTrainedTokenizerBase):
        config, stops = job.config, job.config.stop_strings or []
        self.job, self.generation, self.rules = job, generation, rules_of(config, job.seed)
        self.max_tokens: int = config.max_new_tokens
        eos = config.eos_token_id
        self.stop_ids = frozenset([eos] if isinstance(eos, int) else eos or ())
        stops = [stops] if isinstance(stops, str) else stops
        self.text = AnswerText(tokenizer._tokenizer, keeps_special=job.keeps_special, stops=stops)
        self.cache: RadladsCache | None = None
        self.is_sound: torch.Tensor | None = None  # whether all logits of the prompt were finite; on the device
        self.num_chosen = self.num_told = 0
        self.has_ended = False


class Engine:
    """Generates on a thread of its own. num_unfinished: the jobs that wait or run.

    max_concurrent: texts that are read or decoded at the same time; None: as many as ROWS says and memory allows.
    piece_tokens: of prompts that are read between two steps. state_bytes: for all states; None: half of what is free.
    Raises ValueError if the states do not fit.
    """

    def __init__(
        self,
        model: RadladsForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_concurrent: int | None = None,
        piece_tokens: int | None = None,
        state_bytes: int | None = None,
    ):
        self.model, self.tokenizer, self.metrics = model, tokenizer, Metrics()
        if state_bytes is None:
            state_bytes = int(available_bytes(model.device) * STATE_SHARE)
        rows = _num_rows(model, max_concurrent, state_bytes)
        self.scheduler: Scheduler[_Answer] = Scheduler(rows, state_bytes)
        self.piece_tokens = piece_tokens or PIECE_TOKENS[model.device.type]
        self.num_unfinished = 0
        suppressed = model.generation_config.suppress_tokens or ()
        with torch.inference_mode():
            self._slots = build_slots(model, rows)
            self._sampler = RowSampler(rows, model.config.vocab_size, suppressed, model.device)
        self._active: list[_Answer] = []  # in the order of their rows
        self._pending: deque[tuple[Sent, list[_Answer]]] = deque()
        self._ahead = STEPS_AHEAD if model.device.type == "cuda" else 0
        self._deliveries = Deliveries()
        self._lock = threading.Lock()  # of the scheduler, and of whether the thread is at work
        self._thread = ThreadPoolExecutor(1, "generation")
        self._is_at_work = False
        self._is_closed = threading.Event()
        self._reading: list[_Answer] = []
        # Layer by layer, since a piece of a prompt takes seconds on a CPU
        self._hooks = [block.register_forward_pre_hook(self._stop_if_unwanted) for block in model.model.layers]

    def check_fits(self, num_tokens: int) -> None:
        """Raise ValueError if a text of this length, answer included, can never be answered."""
        self.scheduler.check(bytes_of_text(self.model, num_tokens))

    def submit(self, job: Job) -> Generation:
        """Queue a job. Call it from the event loop that reads the answer. Raises as check_fits."""
        generation = Generation(self._note_end)
        answer = _Answer(job, generation, self.tokenizer)
        with self._lock:
            num_bytes = bytes_of_text(self.model, len(job.tokens) + answer.max_tokens)
            self.scheduler.submit(answer, len(job.tokens), num_bytes)
            self.num_unfinished += 1
            if not self._is_at_work:
                self._is_at_work = True
                self._thread.submit(self._work)
        return generation

    def close(self) -> None:
        """Stop what runs at the model's next layer, forget what waits, and wait for the thread to end."""
        self._is_closed.set()
        self._thread.shutdown(wait=True)
        for hook in self._hooks:
            hook.remove()

    def _note_end(self) -> None:
        self.num_unfinished -= 1

    @torch.inference_mode()
    def _work(self) -> None:
        """Turn after turn, until nothing is left to do."""
        while self._has_work():
            try:
                self._turn()
            except Exception as error:  # whoever waits must hear of it; the traceback is theirs
                self._end_all(error)
            self._deliveries.send()

    def _has_work(self) -> bool:
        with self._lock:
            self._is_at_work = bool(self.scheduler.names() or self._pending)
            return self._is_at_work

    def _turn(self) -> None:
        if self._is_closed.is_set():
            raise Stopped
        with self._lock:
            answers = self.scheduler.names()
        for answer in answers:
            if answer.generation.is_cancelled.is_set():
                self._end(answer, "cancelled", Stopped())
        with self._lock:
            self.scheduler.admit()
            pieces = self.scheduler.pieces(self.piece_tokens)
        for group in self._groups(pieces):
            self._read(group)
        if self._active:
            emitted = self._sampler.choose(self._slots.step(self._sampler.tokens[: len(self._active)]))
            self._send(emitted, list(self._active))
        self._receive()

    def _groups(self, pieces: Sequence[Piece[_Answer]]) -> Iterator[list[Piece[_Answer]]]:
        """Pieces that are read in one call: short prompts of similar length together, anything else by itself."""
        joined: list[Piece[_Answer]] = []
        for piece in sorted(pieces, key=lambda piece: piece.stop - piece.start):
            if not (piece.is_whole and self._slots.reads_together):
                yield [piece]
                continue
            if joined and (len(joined) + 1) * piece.stop > 2 * self.piece_tokens:
                yield joined
                joined = []
            joined.append(piece)
        if joined:
            yield joined

    def _read(self, group: list[Piece[_Answer]]) -> None:
        """Read pieces; an error ends their answers alone."""
        self._reading = [piece.name for piece in group]
        try:
            self._read_together(group)
        except Exception as error:  # such as too little memory: the others go on
            for answer in self._reading:
                self._end(answer, "cancelled" if isinstance(error, Stopped) else "error", error)
        finally:
            self._reading = []

    def _read_together(self, group: list[Piece[_Answer]]) -> None:
        prompts = [piece.name.job.tokens[piece.start : piece.stop] for piece in group]
        tokens, mask = left_padded(prompts, self.model.device)
        cache = group[0].name.cache or RadladsCache(self.model.config)
        outputs = self.model(tokens, mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = outputs.logits[:, -1]
        for index, (piece, is_sound) in enumerate(zip(group, are_finite(logits), strict=True)):
            answer = piece.name
            self.metrics.num_prompt_tokens += piece.stop - piece.start
            answer.is_sound = is_sound if answer.is_sound is None else is_sound & answer.is_sound
            answer.cache = None if piece.is_last else cache
            if piece.is_last:
                self._begin(answer, cache, index, logits[index : index + 1])

    def _begin(self, answer: _Answer, cache: RadladsCache, index: int, logits: torch.Tensor) -> None:
        """Give a text that is read a row, and choose its first token."""
        row = len(self._active)
        self._slots.put(row, cache, index)
        self._sampler.put(row, answer.rules, answer.job.tokens)
        self._active.append(answer)
        emitted = self._sampler.choose(logits, row)
        assert answer.is_sound is not None
        self._send(torch.where(answer.is_sound, emitted, NOT_FINITE), [answer])

    def _leave(self, answer: _Answer) -> None:
        """Take a text's row away, and give the last one's place to it."""
        row, last = self._active.index(answer), len(self._active) - 1
        if row < last:
            self._slots.move(last, row)
            self._sampler.move(last, row)
            self._active[row] = self._active[last]
        self._active.pop()

    def _send(self, emitted: torch.Tensor, answers: list[_Answer]) -> None:
        """Have the tokens come to the host; texts that are complete with them leave."""
        self._pending.append((Sent(emitted), answers))
        for answer in answers:
            answer.num_chosen += 1
            if answer.num_chosen == answer.max_tokens:
                self._leave(answer)

    def _receive(self) -> None:
        """Take the tokens that have come, and wait for those that the device is too far ahead of."""
        while self._pending and (len(self._pending) > self._ahead or not self._active):
            sent, answers = self._pending.popleft()
            for token, answer in zip(sent.read(), answers, strict=True):
                if not answer.has_ended:
                    self._take(answer, token)

    def _take(self, answer: _Answer, token: int) -> None:
        generation = answer.generation
        if token == NOT_FINITE:
            num_tokens = len(answer.job.tokens) + answer.num_told
            self._end(answer, "error", NotFinite(num_tokens))
            return
        is_first = answer.num_told == 0
        answer.num_told += 1
        self.metrics.note_token(generation.began_s if is_first else None)
        self._deliveries.add(generation, answer.text.step(token), is_urgent=is_first)
        if token in answer.stop_ids or answer.text.has_stopped:
            self._end(answer, "stop")
        elif answer.num_told == answer.max_tokens:
            self._end(answer, "length")

    def _end(self, answer: _Answer, outcome: str, error: BaseException | None = None) -> None:
        """End an answer, wherever it is. outcome: one of metrics.OUTCOMES."""
        if answer in self._active:
            self._leave(answer)
        with self._lock:
            self.scheduler.release(answer)
        answer.has_ended, answer.cache = True, None
        self.metrics.requests[outcome] += 1
        self._deliveries.end(answer.generation, "" if error else answer.text.rest(), error)

    def _end_all(self, error: Exception) -> None:
        with self._lock:
            answers = self.scheduler.names()
        self._active.clear()
        self._pending.clear()
        for answer in answers:
            self._end(answer, "cancelled" if isinstance(error, Stopped) else "error", error)

    def _stop_if_unwanted(self, *call: Any) -> None:
        if not self._is_at_work:
            return
        is_cancelled = self._reading and all(answer.generation.is_cancelled.is_set() for answer in self._reading)
        if is_cancelled or self._is_closed.is_set():
            raise Stopped


def _num_rows(model: RadladsForCausalLM, wanted: int | None, state_bytes: int) -> int:
    """How many texts are answered at the same time. Raises ValueError if their states do not fit."""
    default = ROWS[model.device.type]
    if grows(model):  # the scheduler looks at each request's size
        return wanted or default
    fitting = state_bytes // bytes_of_text(model, 1)
    if fitting < (wanted or 1):
        needed = bytes_of_text(model, 1) * (wanted or 1)
        texts = "one request needs" if wanted in (None, 1) else f"{wanted} requests need"
        raise ValueError(
            f"{texts} {needed / 1e9:.3g} GB of state, but there are {state_bytes / 1e9:.3g} GB for it: "
            f"give a larger --state-memory{'' if wanted in (None, 1) else ' or a smaller --max-concurrent'}"
        )
    return wanted or min(default, fitting)
