"""What transformers' models give on request: hidden states, tuples, exported graphs; and what we refuse."""

import pytest
import torch
from test_generation import logits_of, perturbed_model, random_tokens
from tolerances import PARITY, relative_error
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from radlads.model.configuration import RadladsConfig
from radlads.model.exporting import is_exporting
from radlads.model.modeling import RadladsForCausalLM

STACKS = ("rwkv7", "rwkv6", "mixed")
SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6}


@pytest.fixture(params=STACKS)
def model(request):
    return perturbed_model(request.param)


def qwen2_twins():
    """transformers' Qwen2 and ours, with the same weights."""
    torch.manual_seed(0)
    theirs = Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS)).eval()
    rope = {"rope_parameters": theirs.config.rope_parameters}
    ours = RadladsForCausalLM(RadladsConfig(**SIZES, **HEADS, **rope, time_mixers=["qwen2"] * 3)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def test_hidden_states_are_qwen2s():
    ids = random_tokens(2, 9)
    with torch.no_grad():
        theirs, ours = (each(ids, output_hidden_states=True).hidden_states for each in qwen2_twins())
    assert len(ours) == len(theirs) == 4
    assert all((a - b).abs().max() < PARITY for a, b in zip(ours, theirs, strict=True))


def test_hidden_states_begin_with_the_embedding_and_end_before_the_head(model):
    ids = random_tokens(2, 9)
    outputs = model(ids, output_hidden_states=True)
    assert torch.equal(outputs.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    assert model(ids).hidden_states is None


def test_hidden_states_by_configuration_and_from_generate(model):
    ids = random_tokens(2, 5)
    wanted = {"output_hidden_states": True, "return_dict_in_generate": True}
    steps = model.generate(ids, max_new_tokens=3, do_sample=False, **wanted).hidden_states
    assert [[x.shape[1] for x in step] for step in steps] == [[5] * 4, [1] * 4, [1] * 4]
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == len(model.model(ids).hidden_states) == 4
    assert model(ids, output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("call", ["by argument", "by configuration", "in generate"])
def test_attention_weights_are_refused(model, call):
    ids = random_tokens(2, 5)
    with pytest.raises(ValueError, match="output_attentions must be off: there are no attention weights to return"):
        if call == "by argument":
            model(ids, output_attentions=True)
        elif call == "in generate":
            model.generate(ids, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
        else:
            model.config._output_attentions = True
            model(ids)


def test_a_tuple_is_given_on_request(model):
    ids = random_tokens(2, 5)
    whole = model(ids, labels=ids)
    loss, logits, cache = model(ids, labels=ids, return_dict=False)
    assert torch.equal(loss, whole.loss) and torch.equal(logits, whole.logits)
    assert cache.get_seq_length() == 5
    hidden, _ = model.model(ids, return_dict=False)
    assert torch.equal(model.lm_head(hidden), logits)
    model.config.return_dict = False
    assert torch.equal(model(ids)[0], logits)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_hand_made_cache_is_refused_with_the_remedy(model, call):
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="not DynamicCache: leave it out, and the model makes its own"):
        if call == "forward":
            model(random_tokens(2, 5), past_key_values=cache)
        else:
            model.generate(random_tokens(2, 5), past_key_values=cache, max_new_tokens=2)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(ids, attention_mask=mask, use_cache=False).logits


def gradients(model, call):
    model.zero_grad()
    call().logsumexp(-1).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize(("stack", "strict"), [("rwkv7", False), ("rwkv6", False), ("mixed", True)])
def test_an_exported_graph_is_the_model_for_other_batches_masks_and_gradients(stack, strict):
    """In grad mode, as transformers' own are exported. 41 tokens: a chunk and a part of one."""
    model = perturbed_model(stack)
    ids, mask = random_tokens(3, 41), torch.ones(3, 41, dtype=torch.long)
    batch = torch.export.Dim("batch", min=2, max=16)
    shapes = {"dynamic_shapes": ({0: batch}, {0: batch})}
    graph = torch.export.export(Logits(model), (ids[:2], mask[:2]), strict=strict, **shapes).module()
    mask[0, :5] = 0
    assert relative_error(graph(ids, mask), logits_of(model, ids, attention_mask=mask)) < PARITY
    expected = gradients(model, lambda: model(ids, attention_mask=mask, use_cache=False).logits)
    for traced, own in zip(gradients(model, lambda: graph(ids, mask)), expected, strict=True):
        assert relative_error(traced, own, floor=1e-3) < 1e-4


class Exporting(torch.nn.Module):
    def forward(self, x):
        return x + 1 if is_exporting() else x


def test_only_exporting_counts_as_exporting():
    x = torch.zeros(2)
    assert not Exporting()(x).any()
    assert not torch.compile(Exporting(), fullgraph=True, backend="eager")(x).any()
    for strict in (False, True):
        assert torch.export.export(Exporting(), (x,), strict=strict).module()(x).all()


def test_exporting_leaves_the_model_as_it_was(model):
    ids = random_tokens(2, 9)
    expected = logits_of(model, ids, use_cache=False)
    torch.export.export(Logits(model), (ids, None))
    assert torch.equal(logits_of(model, ids, use_cache=False), expected)
