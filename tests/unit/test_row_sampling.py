"""Tokens chosen row by row: as transformers' generate would, and whoever else is in the batch."""

import dataclasses

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from radlads.inference.batching.row_sampling import RowSampler, Rules, not_applied, rules_of
from radlads.inference.decoder import NOT_FINITE

VOCAB = 300  # more than one group of running_sums
CPU = torch.device("cpu")
KINDS = {
    "greedy": Rules(),
    "penalised": Rules(repetition_penalty=1.7),
    "biased": Rules(bias={5: 9.0, 17: -9.0}),
    "plain": Rules(temperature=0.9, seed=1),
    "top_k": Rules(temperature=0.9, top_k=7, seed=2),
    "top_p": Rules(temperature=1.3, top_p=0.6, seed=3),
    "min_p": Rules(temperature=1.3, min_p=0.2, seed=4),
    "all": Rules(0.8, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.3, bias={3: 2.0}, seed=5),
}
PROMPT = [1, 2, 3, 250]


def sampler_of(*rules, suppressed=()):
    made = RowSampler(len(rules), VOCAB, list(suppressed), CPU)
    for row, each in enumerate(rules):
        made.put(row, each, PROMPT)
    return made


@pytest.fixture(scope="module")
def logits():
    """[steps, V]: what each row sees, step by step; more steps than draws are made at a time."""
    torch.manual_seed(0)
    return 2 * torch.randn(300, VOCAB)


@pytest.fixture(scope="module")
def alone(logits):
    """The tokens that each kind of row chooses when it is alone."""
    found = {}
    for kind, rules in KINDS.items():
        sampler = sampler_of(rules)
        found[kind] = [int(sampler.choose(step[None])[0]) for step in logits]
    return found


def test_rows_of_every_kind_choose_together_what_they_choose_alone(logits, alone):
    kinds = list(KINDS)
    sampler = sampler_of(*KINDS.values())
    together = [sampler.choose(step.expand(len(kinds), -1)).tolist() for step in logits]
    for row, kind in enumerate(kinds):
        assert [tokens[row] for tokens in together] == alone[kind], kind


def test_a_row_that_moves_goes_on_as_it_was(logits, alone):
    for kind, rules in KINDS.items():
        sampler = sampler_of(Rules(temperature=2.0, repetition_penalty=3.0, bias={0: 50.0}), rules)
        tokens = [int(sampler.choose(step.expand(2, -1))[1]) for step in logits[:150]]
        sampler.move(1, 0)
        assert sampler.tokens[0] == tokens[-1]
        tokens += [int(sampler.choose(step[None])[0]) for step in logits[150:]]
        assert tokens == alone[kind], kind


def test_a_seed_repeats_and_none_does_not(logits):
    unseeded = dataclasses.replace(KINDS["plain"], seed=None)
    for rules, is_same in ((KINDS["plain"], True), (unseeded, False)):
        runs = []
        for _ in range(2):
            sampler = sampler_of(rules)
            runs.append([int(sampler.choose(step[None])[0]) for step in logits[:20]])
        assert (runs[0] == runs[1]) == is_same


def transformers_probabilities(rules, scores, tokens):
    """What generate() would draw from."""
    chain = [
        SequenceBiasLogitsProcessor({(token,): bias for token, bias in rules.bias.items()}) if rules.bias else None,
        RepetitionPenaltyLogitsProcessor(rules.repetition_penalty),
        TemperatureLogitsWarper(rules.temperature),
        TopKLogitsWarper(rules.top_k) if rules.top_k else None,
        TopPLogitsWarper(rules.top_p) if rules.top_p < 1 else None,
        MinPLogitsWarper(rules.min_p) if rules.min_p else None,
    ]
    processed = LogitsProcessorList([each for each in chain if each])(torch.tensor([tokens]), scores[None])
    return processed[0].softmax(-1)


@pytest.mark.parametrize("kind", ["plain", "top_k", "top_p", "min_p", "all"])
def test_draws_are_from_the_distribution_of_transformers(kind, logits):
    rules, scores, num_rows = KINDS[kind], logits[0], 4000
    sampler = sampler_of(*(dataclasses.replace(rules, seed=seed) for seed in range(num_rows)))
    drawn = sampler.choose(scores.expand(num_rows, -1))
    found = drawn.bincount(minlength=VOCAB) / num_rows
    expected = transformers_probabilities(rules, scores, PROMPT)
    assert found[expected == 0].sum() == 0
    assert (found - expected).abs().max() < 4 * (0.25 / num_rows) ** 0.5


@pytest.mark.parametrize("kind", ["penalised", "biased"])
def test_greedy_rows_choose_what_transformers_does(kind, logits):
    rules, tokens = KINDS[kind], list(PROMPT)
    sampler = sampler_of(rules)
    for scores in logits[:50]:
        warm = dataclasses.replace(rules, temperature=1.0)
        tokens.append(int(transformers_probabilities(warm, scores, tokens).argmax()))
        assert int(sampler.choose(scores[None])[0]) == tokens[-1]


def test_suppressed_ids_are_never_chosen_and_bias_does_not_stay_in_the_row():
    sampler = sampler_of(Rules(bias={7: 80.0}), suppressed=range(10, VOCAB))
    scores = torch.arange(float(VOCAB))[None]
    assert sampler.choose(scores).tolist() == [7]
    sampler.put(0, Rules(), PROMPT)
    assert sampler.choose(scores).tolist() == [9]


def test_only_the_row_whose_logits_are_not_finite_is_told_so():
    sampler = sampler_of(Rules(), KINDS["all"], KINDS["plain"])
    scores = torch.zeros(3, VOCAB)
    scores[:, 4] = 30.0
    scores[1, 200] = torch.nan
    assert sampler.choose(scores).tolist() == [4, NOT_FINITE, 4]


def test_a_generation_config_becomes_rules_or_is_told_of():
    config = GenerationConfig(temperature=0.7, top_k=20, top_p=0.8, min_p=0.1, repetition_penalty=1.1, do_sample=True)
    config.sequence_bias = {(5,): 2.0}
    assert rules_of(config, 3) == Rules(0.7, 20, 0.8, 0.1, 1.1, {5: 2.0}, 3)
    assert rules_of(GenerationConfig(temperature=0.7), None).temperature == 0
    assert rules_of(GenerationConfig(do_sample=True), None) == Rules(temperature=1.0)
    assert not_applied(config) == [] == not_applied(GenerationConfig())
    assert not_applied(GenerationConfig(no_repeat_ngram_size=3, num_beams=4)) == ["no_repeat_ngram_size", "num_beams"]
