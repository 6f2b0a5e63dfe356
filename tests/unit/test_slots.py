"""Rows that join, move and leave: each is advanced as if it were alone."""

import documented_mixers
import pytest
import torch
from test_decoder import VOCAB, perturbed

from radlads.inference.batching.slots import CachedSlots, RecurrentSlots, build_slots, graph_sizes
from radlads.inference.prefill import left_padded, prefill

WINDOWED = {"mixer_settings": {"rad_rwkv7": {"window_tokens": 5, "sink_tokens": 2}}}
STACKS = {
    "rwkv7": {},
    "rwkv6": {"mixers": ("rad_rwkv6", "rad_rwkv7")},
    "windows": WINDOWED,
    "softmax": {"mixers": ("rad_rwkv7", "qwen2")},
    "own mixers": {"mixers": ("leaky", "mean")},
}


def logits_alone(model, text, num_tokens):
    """Log probabilities [num_tokens, V] of the last tokens of a text, read in one go."""
    with torch.inference_mode():
        return model(torch.tensor([text]), use_cache=False).logits[0, -num_tokens:].log_softmax(-1)


@pytest.fixture(autouse=True, scope="module")
def known_mixers(tmp_path_factory):
    with documented_mixers.known(documented_mixers.write_mixers(tmp_path_factory.mktemp("mixers"))):
        yield


@pytest.mark.parametrize("stack", STACKS)
def test_rows_that_come_and_go_are_each_what_they_are_alone(stack):
    model = perturbed(**STACKS[stack])
    torch.manual_seed(3)
    texts = {
        name: torch.randint(VOCAB, (length,)).tolist() for name, length in zip("abcd", (4, 19, 12, 30), strict=True)
    }
    slots, rows, fed = build_slots(model, 3), [], dict.fromkeys("abcd", 2)

    def join(name):
        _, cache = prefill(model, torch.tensor([texts[name][:2]]))
        slots.put(len(rows), cache)
        rows.append(name)

    def leave(name):
        row = rows.index(name)
        if row < len(rows) - 1:
            slots.move(len(rows) - 1, row)
            rows[row] = rows[-1]
        rows.pop()

    def step():
        logits = slots.step(torch.tensor([texts[name][fed[name]] for name in rows])).log_softmax(-1)
        for row, name in enumerate(rows):
            fed[name] += 1
            expected = logits_alone(model, texts[name][: fed[name]], 1)[0]
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-4)

    with torch.inference_mode():
        join("a"), step(), join("b"), join("c"), step()
        leave("a"), step(), join("d")
        for _ in range(6):
            step()
        leave("c"), step(), step(), leave("b")
        for _ in range(8):
            step()


def test_texts_that_were_read_in_one_padded_batch_go_to_rows_one_by_one():
    model = perturbed(**WINDOWED)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]
    slots = RecurrentSlots(model, 4)
    with torch.inference_mode():
        tokens, mask = left_padded(prompts, model.device)
        _, cache = prefill(model, tokens, mask=mask)
        for row, index in enumerate((2, 0, 1)):
            slots.put(row, cache, index)
        logits = slots.step(torch.tensor([1, 2, 3])).log_softmax(-1)
    for row, (index, token) in enumerate(((2, 1), (0, 2), (1, 3))):
        expected = logits_alone(model, [*prompts[index], token], 1)[0]
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-4)


def test_stacks_with_softmax_layers_have_a_cache_for_each_row():
    assert isinstance(build_slots(perturbed(("rad_rwkv7", "qwen2")), 2), CachedSlots)
    assert not build_slots(perturbed(("rad_rwkv7", "qwen2")), 2).reads_together


def test_graphs_are_of_powers_of_two_and_of_all_rows():
    assert graph_sizes(32) == [1, 2, 4, 8, 16, 32]
    assert graph_sizes(24) == [1, 2, 4, 8, 16, 24]
    assert graph_sizes(1) == [1]
