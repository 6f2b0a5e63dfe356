"""Rows that the student writes while it trains: its own replies to a corpus's prompts, for its teacher to score.

For a window of steps at a time a copy of the student, as it is when the window begins, answers prompts, many together;
all processes share the work, and have all rows. What is written follows from the weights, the seed and the window.
A checkpoint amid a window holds its rows. Leaves decoding to inference/, the loss to distill/.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch

from radlads.checkpoint.model_folder import unplaced_model
from radlads.config.schema import TrainConfig
from radlads.data.chat_rows import BY_STUDENT, OWN, TO_WRITE, ConversationRows, as_row, num_on_policy, packed
from radlads.data.mixture import locate
from radlads.inference.decoder import Decoder
from radlads.inference.sampling import Sampling
from radlads.model.configuration import state_bytes
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.whole_parameters import whole
from radlads.train.processes.group import Processes

# Replies at a time. A step through a growing cache is not recorded, and takes a GPU's host as long for many as for one
_RECORDED_ROWS, _UNRECORDED_ROWS, _CPU_ROWS = 256, 1024, 16
# Of a GPU's memory, for the states of replies that are being written: training needs the rest
_STATE_SHARE = 0.05
# So much more than a corpus's mean length makes of the rows; if replies are shorter, more are written
_SPARE = 1.1
# Tokens of prompts that are read at a time, of all rows
_PREFILL_TOKENS = 65_536
# Of a corpus's replies that end in a token which ends one in so many: rarer ends are of replies that were cut
_FEWEST_ENDS, _ENDED_SHARE = 0.01, 0.9
WINDOW, ROWS = "window", "rows"


class _Own(NamedTuple):
    """What one conversation became: its tokens, and how many of them were there before."""

    tokens: list[int]
    num_given: int


class OnPolicy:
    """The student's own rows of a stage of `num_steps`, in windows of train.on_policy_every_steps.

    samples: the stage's, of any process, whose rows to be written stand for these. sequences: of all processes, in a
    step. Raises ValueError if the corpora's replies end in no token of their own.
    """

    def __init__(
        self, train: TrainConfig, samples: ConversationRows, *, num_steps: int, sequences: int, processes: Processes
    ):
        self._train, self._samples, self._processes = train, samples, processes
        self._num_steps, self._sequences = num_steps, sequences
        self._stop_ids = _stop_ids(samples)
        self._window = -1
        self._rows = torch.zeros(0, samples.context_tokens + 1, dtype=torch.int64)
        self._writer: _Writer | None = None

    def fill(self, rows: torch.Tensor, student: RadladsForCausalLM, step: int) -> torch.Tensor:
        """Rows [B, T + 1] of step `step` (from 0), with the student's in place of those that it is to write.

        Where a window begins, its rows are written first; all processes have to call this.
        """
        window = step // self._train.on_policy_every_steps
        if window != self._window:
            self._rows, self._window = self._written(student, window), window
        self._rows = self._rows.to(rows.device)
        if not len(self._rows):
            return rows
        first, _ = self._numbers(window)
        index = ((rows[:, 0] & (OWN - 1)) - first).clamp(0, len(self._rows) - 1)
        is_written = (rows[:, 0] & TO_WRITE) != 0
        return torch.where(is_written[:, None], self._rows.index_select(0, index), rows)

    def state(self, step: int) -> dict[str, torch.Tensor]:
        """What a checkpoint after `step` steps holds of the window that it is in; nothing where a new one begins."""
        if step % self._train.on_policy_every_steps == 0 or self._window < 0:
            return {}
        return {WINDOW: torch.tensor([self._window]), ROWS: self._rows.cpu()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on with what a checkpoint holds."""
        self._window, self._rows = int(state[WINDOW]), state[ROWS].clone()

    def _numbers(self, window: int) -> tuple[int, int]:
        """The first row that the student writes in a window, and the first of the next, counted from the start."""
        every = self._train.on_policy_every_steps
        steps = min(window * every, self._num_steps), min((window + 1) * every, self._num_steps)
        first, end = (num_on_policy(step * self._sequences, self._samples.on_policy_share) for step in steps)
        return first, end

    def _written(self, student: RadladsForCausalLM, window: int) -> torch.Tensor:
        """A window's rows [R, T + 1], the same in all processes."""
        first, end = self._numbers(window)
        num_rows, num_tokens = end - first, self._samples.context_tokens + 1
        if not num_rows:
            return self._rows[:0]
        batch = self._replies_for(num_rows)
        if self._writer is None:
            # Of the stage's largest window: a run that goes on would begin with another window, and decode otherwise
            most = self._train.on_policy_every_steps * self._sequences * self._samples.on_policy_share
            share = math.ceil(self._replies_for(math.ceil(most)) / self._processes.size)
            self._writer = _Writer(student, self._train, self._stop_ids, share, num_tokens)
        self._writer.take_weights(student)
        own: list[_Own] = []
        while True:
            own += self._batch(window, len(own), batch)
            rows = packed(np.array([len(each.tokens) for each in own]), num_tokens, window)
            # The last ones that were begun are emptier than rows of the corpus
            if len(rows) > num_rows:
                break
            batch = math.ceil(batch / 4)
        fullest = sorted(rows, key=lambda row: -sum(len(own[each].tokens) for each in row))[:num_rows]
        pieces = ([_as_piece(own[each]) for each in row] for row in fullest)
        return torch.stack([as_row(row, num_tokens, flag=BY_STUDENT) for row in pieces])

    def _replies_for(self, num_rows: int) -> int:
        """How many replies to begin with for these rows."""
        means = [corpus.mean_tokens() * float(share) for corpus, share in self._weighted()]
        return math.ceil(_SPARE * num_rows * (self._samples.context_tokens + 1) / sum(means))

    def _weighted(self):
        return zip(self._samples.corpora, self._samples.shares, strict=True)

    def _batch(self, window: int, start: int, num: int) -> list[_Own]:
        """Conversations number `start` to `start` + `num` - 1 of a window, each process writing its part."""
        assert self._writer is not None
        numbers = range(start, start + num)
        mine = numbers[self._processes.rank :: self._processes.size]
        prompts, seeds, orders = [], [], dict[tuple[int, int], np.ndarray]()
        for number in mine:
            draw = np.random.default_rng([self._train.seed_everything, 1, window, number])
            corpus, index = locate(number, self._samples.shares)
            held = self._samples.corpora[corpus]
            epoch, place = divmod(index, len(held))
            if (corpus, epoch) not in orders:
                order = np.random.default_rng([self._train.seed_everything, 2, window, corpus, epoch])
                orders[corpus, epoch] = order.permutation(len(held))
            prompts.append(held.beginning(int(orders[corpus, epoch][place]), draw.random()).tolist())
            seeds.append(int(draw.integers(2**62)))
        written = self._writer.replies(prompts, seeds)
        found: dict[int, _Own] = {}
        for part in self._processes.gather(list(zip(mine, prompts, written, strict=True))):
            found |= {number: _Own([*prompt, *reply], len(prompt)) for number, prompt, reply in part}
        return [found[number] for number in numbers]


class _Writer:
    """A copy of the student that decodes `rows` replies together, in bf16 on a GPU. num_tokens: of a training row."""

    def __init__(
        self, student: RadladsForCausalLM, train: TrainConfig, stop_ids: Sequence[int], rows: int, num_tokens: int
    ):
        device = student.lm_head.weight.device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = unplaced_model(student.config, dtype)
        is_empty = any(parameter.is_meta for parameter in model.parameters())
        self._model = (model.to_empty(device=device) if is_empty else model.to(device)).eval().requires_grad_(False)
        self._model.tie_weights()
        self._rows, self._num_tokens, self._stop_ids = _fitting(self._model, rows, num_tokens), num_tokens, stop_ids
        self._sampling = Sampling(
            temperature=train.on_policy_temperature, max_tokens=train.on_policy_max_tokens, seed=train.seed_everything
        )
        self._decoder: Decoder | None = None

    @torch.no_grad()
    def take_weights(self, student: RadladsForCausalLM) -> None:
        """Become what the student is now, however its parameters are kept; all processes have to call this."""
        own = dict(self._model.named_parameters()) | dict(self._model.named_buffers())
        stack = student.model
        parts = [("model.embed_tokens", stack.embed_tokens), ("model.norm", stack.norm), ("lm_head", student.lm_head)]
        parts += [(f"model.layers.{layer}", block) for layer, block in enumerate(stack.layers)]
        for prefix, part in parts:
            # FSDP2 keeps the first two with the stack
            with whole(stack) if part in (stack.embed_tokens, stack.norm) else nullcontext(), whole(part):
                for name, value in [*part.named_parameters(), *part.named_buffers()]:
                    if f"{prefix}.{name}" in own:  # a tied head is there once
                        own[f"{prefix}.{name}"].copy_(value)
        if self._decoder is not None:
            self._decoder.follow_weights()

    @torch.inference_mode()
    def replies(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[list[int]]:
        """A reply to each prompt, with the token that ends it if it ends by itself, cut to fit into a row."""
        found: list[list[int]] = []
        with torch.autocast(self._model.device.type, enabled=False):
            if self._decoder is None:
                self._decoder = Decoder(self._model, self._rows, self._sampling, frozenset(self._stop_ids))
            for start in range(0, len(prompts), self._rows):
                found += self._decoded(prompts[start : start + self._rows], seeds[start : start + self._rows])
        room = (self._num_tokens - len(prompt) for prompt in prompts)
        return [reply[:most] for reply, most in zip(found, room, strict=True)]

    def _decoded(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[list[int]]:
        assert self._decoder is not None
        num_missing = self._rows - len(prompts)  # a recorded step is of all rows
        generators = [torch.Generator().manual_seed(seed) for seed in (*seeds, *[0] * num_missing)]
        padded = [*prompts, *[prompts[0][:1]] * num_missing]
        self._decoder.prefill(padded, piece=max(64, _PREFILL_TOKENS // self._rows), generators=generators)
        replies: list[list[int]] = [[] for _ in prompts]
        has_ended = [False] * len(prompts)
        for step in self._decoder.generated(self._sampling.max_tokens):
            for row, reply in enumerate(replies):
                token = step[row]
                if token is not None:
                    reply.append(token)
                has_ended[row] = token is None
            if all(has_ended):
                break
        end = self._stop_ids[0]
        most = self._sampling.max_tokens
        return [[*reply, end] if len(reply) < most else reply for reply in replies]


def _as_piece(own: _Own) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.array(own.tokens, dtype=np.int64)
    return tokens, np.arange(len(tokens)) >= own.num_given


def _fitting(model: RadladsForCausalLM, rows: int, num_tokens: int) -> int:
    """As many of `rows` replies as are written at a time."""
    if model.device.type != "cuda":
        return min(rows, _CPU_ROWS)
    grows = len(model.config.recurrent_layers) < model.config.num_hidden_layers
    num_bytes = state_bytes(model.config, num_tokens, bytes_per_value=model.dtype.itemsize)
    total = torch.cuda.get_device_properties(model.device).total_memory
    most = _UNRECORDED_ROWS if grows else _RECORDED_ROWS
    return max(1, min(rows, most, int(_STATE_SHARE * total) // num_bytes))


def _stop_ids(samples: ConversationRows) -> list[int]:
    """The tokens that end replies in the corpora, the most usual first."""
    ends: Counter[int] = Counter()
    for corpus in samples.corpora:
        ends.update(corpus.reply_ends())
    total = ends.total()
    usual = [token for token, count in ends.most_common() if count >= _FEWEST_ENDS * total]
    if sum(ends[token] for token in usual) < _ENDED_SHARE * total:
        names = ", ".join(f"{corpus.reader.path_stem}.bin" for corpus in samples.corpora)
        raise ValueError(
            f"the replies in {names} end in no token of their own, so that nothing would end the student's: build them "
            "with a template that puts a special token after a reply, or set train.on_policy_share 0"
        )
    return usual
