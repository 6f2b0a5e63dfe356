"""How each row's next token is chosen: every row by its own rules, all rows at once, without waiting for the device.

A row's choice depends on its logits, rules and seed alone, whatever is in the other rows. Shape letters: B rows, V
vocabulary, K candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig

from radlads.inference.decoder import NOT_FINITE
from radlads.inference.finite import are_finite
from radlads.inference.sampling import draw, running_sums

DRAWS = 256
# Of generation_config.json: what a row's rules are made of, and what changes answers but is not applied here
NOT_APPLIED = (
    *("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h", "no_repeat_ngram_size", "bad_words_ids", "min_length"),
    *("min_new_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "guidance_scale"),
    *("exponential_decay_length_penalty", "watermarking_config", "penalty_alpha", "dola_layers", "token_healing"),
)
NEUTRAL: tuple[object, ...] = (None, 0, 0.0, 1, 1.0, [], False)


@dataclass(frozen=True)
class Rules:
    """temperature 0 takes the likeliest; top_k 0, top_p 1 and min_p 0 leave all tokens in. repetition_penalty, above
    0: what the scores of tokens that occurred are divided by, or multiplied with if below 0; 1: none. bias: added to
    the logits of these ids, -inf for those never chosen. seed None: draws another text every time."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None

    @property
    def sorts(self) -> bool:
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


def rules_of(config: GenerationConfig, seed: int | None) -> Rules:
    """What transformers' generate would do by this configuration, suppress_tokens aside."""
    return Rules(
        temperature=(1.0 if config.temperature is None else config.temperature) if config.do_sample else 0.0,
        top_k=config.top_k or 0,
        top_p=1.0 if config.top_p is None else config.top_p,
        min_p=config.min_p or 0.0,
        repetition_penalty=config.repetition_penalty or 1.0,
        bias={ids[0]: bias for ids, bias in (config.sequence_bias or {}).items()},
        seed=seed,
    )


def not_applied(config: GenerationConfig) -> list[str]:
    """The settings of a configuration that would change answers, but are not known to Rules."""
    names = [name for name in NOT_APPLIED if getattr(config, name, None) not in NEUTRAL]
    return names + (["num_beams"] if (config.num_beams or 1) > 1 else [])


class RowSampler:
    """The rules, generators and last tokens of `rows` rows. suppressed: ids that no row ever chooses.

    tokens: [B], each row's last token, on the device.
    """

    def __init__(self, rows: int, vocab_size: int, suppressed: Sequence[int], device: torch.device):
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._base_bias = torch.zeros(vocab_size, device=device)
        self._base_bias[torch.tensor(suppressed, dtype=torch.int64, device=device)] = -torch.inf
        self._bias = self._base_bias.repeat(rows, 1)
        self._has_occurred = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)
        self._draws = torch.zeros(rows, DRAWS, device=device)
        self._next_draw = torch.zeros(rows, dtype=torch.int64, device=device)
        # Of each row: temperature (1: greedy), top_k (V: none), top_p, min_p, penalty, whether it draws, whether sorted
        self._numbers = torch.ones(rows, 7, device=device)
        self._rules: list[Rules] = [Rules()] * rows
        self._generators = [torch.Generator() for _ in range(rows)]
        self._num_drawn = [0] * rows

    def put(self, row: int, rules: Rules, prompt: Sequence[int]) -> None:
        """Have a row follow these rules, after this prompt."""
        device = self.tokens.device
        self._rules[row], self._num_drawn[row] = rules, 0
        generator = self._generators[row] = torch.Generator()
        generator.seed() if rules.seed is None else generator.manual_seed(rules.seed)
        self._next_draw[row] = 0
        self._bias[row].copy_(self._base_bias)
        if rules.bias:
            ids = torch.tensor(list(rules.bias), device=device)
            self._bias[row].index_add_(0, ids, torch.tensor(list(rules.bias.values()), device=device))
        if rules.repetition_penalty != 1:
            self._has_occurred[row].zero_()
            self._has_occurred[row, torch.tensor(prompt, device=device)] = True
        numbers = (
            *(rules.temperature or 1.0, rules.top_k or len(self._base_bias), rules.top_p, rules.min_p),
            *(rules.repetition_penalty, rules.temperature > 0, rules.sorts),
        )
        self._numbers[row].copy_(torch.tensor(numbers, dtype=torch.float32))

    def move(self, source: int, target: int) -> None:
        """Have a row be what another one is, which is given up."""
        for held in (self.tokens, self._bias, self._draws, self._next_draw, self._numbers):
            held[target].copy_(held[source])
        if self._rules[source].repetition_penalty != 1:
            self._has_occurred[target].copy_(self._has_occurred[source])
        self._rules[target], self._generators[target] = self._rules[source], self._generators[source]
        self._num_drawn[target] = self._num_drawn[source]

    def choose(self, logits_BV: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Choose the next tokens of the rows from `first` on by their logits, into `tokens`.

        Returns them [B], NOT_FINITE in place of those whose logits are not finite.
        """
        rows = slice(first, first + len(logits_BV))
        rules, numbers_B7 = self._rules[rows], self._numbers[rows]
        sound_B, scores_BV = are_finite(logits_BV), logits_BV.float() + self._bias[rows]
        if any(each.repetition_penalty != 1 for each in rules):
            divisor_B1 = numbers_B7[:, 4:5]
            penalised_BV = torch.where(scores_BV < 0, scores_BV * divisor_B1, scores_BV / divisor_B1)
            scores_BV = torch.where(self._has_occurred[rows] & (divisor_B1 != 1), penalised_BV, scores_BV)
        chosen_B = scores_BV.argmax(-1)
        if any(each.temperature > 0 for each in rules):
            chosen_B = torch.where(numbers_B7[:, 5] > 0, self._drawn(scores_BV, rows), chosen_B)
        self.tokens[rows] = chosen_B
        if any(each.repetition_penalty != 1 for each in rules):
            self._has_occurred[rows].scatter_(1, chosen_B[:, None], True)
        return torch.where(sound_B, chosen_B, NOT_FINITE)

    def _drawn(self, scores_BV: torch.Tensor, rows: slice) -> torch.Tensor:
        """A drawn token for each row. Sorted and unsorted rows use a draw in different ways, whoever else is there."""
        rules = [each for each in self._rules[rows] if each.temperature > 0]
        numbers_B7, uniforms_B = self._numbers[rows], self._next_uniforms(rows)
        scores_BV = scores_BV / numbers_B7[:, 0:1]
        if all(not each.sorts for each in rules):
            return draw(_weights(scores_BV, numbers_B7[:, 3:4]), uniforms_B)
        most = max(each.top_k for each in rules if each.sorts)
        if any(each.sorts and not each.top_k for each in rules) or most >= scores_BV.shape[1]:
            sorted_BK, ids_BK = scores_BV.sort(descending=True)
        else:
            sorted_BK, ids_BK = scores_BV.topk(most)
        weights_BK = _kept(_weights(sorted_BK, None), numbers_B7)
        sorted_B = ids_BK.gather(1, draw(weights_BK, uniforms_B)[:, None])[:, 0]
        if all(each.sorts for each in rules):
            return sorted_B
        unsorted_B = draw(_weights(scores_BV, numbers_B7[:, 3:4]), uniforms_B)
        return torch.where(numbers_B7[:, 6] > 0, sorted_B, unsorted_B)

    def _next_uniforms(self, rows: slice) -> torch.Tensor:
        """The next draw of each row, [B]; rows that have used theirs up get new ones."""
        for row in range(rows.start, rows.stop):
            if self._rules[row].temperature > 0:
                if self._num_drawn[row] % DRAWS == 0:
                    self._draws[row].copy_(torch.rand(DRAWS, generator=self._generators[row]))
                self._num_drawn[row] += 1
        places_B = self._next_draw[rows]
        uniforms_B = self._draws[rows].gather(1, places_B[:, None])[:, 0]
        places_B.add_(1).remainder_(DRAWS)
        return uniforms_B


def _weights(scores_BV: torch.Tensor, min_p_B1: torch.Tensor | None) -> torch.Tensor:
    """Unnormed probabilities, the likeliest 1; 0 for those below min_p."""
    weights_BV = (scores_BV - scores_BV.amax(-1, keepdim=True)).exp()
    return weights_BV if min_p_B1 is None else weights_BV.masked_fill(weights_BV < min_p_B1, 0.0)


def _kept(weights_BK: torch.Tensor, numbers_B7: torch.Tensor) -> torch.Tensor:
    """Weights in falling order, 0 for those beyond top_k, then top_p, then min_p."""
    places_K = torch.arange(weights_BK.shape[1], device=weights_BK.device)
    weights_BK = weights_BK.masked_fill(places_K >= numbers_B7[:, 1:2], 0.0)
    below_BK = running_sums(weights_BK)
    # top_p 1 keeps all, although rounding may make the sum before the last ones as large as the whole
    beyond_BK = (below_BK - weights_BK >= numbers_B7[:, 2:3] * below_BK[:, -1:]) & (numbers_B7[:, 2:3] < 1)
    return weights_BK.masked_fill(beyond_BK | (weights_BK < numbers_B7[:, 3:4]), 0.0)
