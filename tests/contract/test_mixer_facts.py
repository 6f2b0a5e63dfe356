"""What every registered time mixer says about itself (TimeMixer) is what it does."""

import pytest
import torch

from radlads.model.cache import RadladsCache, RecurrentCacheLayer
from radlads.model.configuration import RadladsConfig, state_bytes
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.registry import TIME_MIXERS, mixer_class

SIZES = {"vocab_size": 96, "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SWITCHES = {
    "plain": {},
    "bare": {"gate_rank_type": 0, "use_tokenshift": False, "use_rope": False},
    "normed": {"gate_rank_type": 1, "groupnorm_att": True, "balance_state": False, "qk_norm": True},
    "windowed": {"mixer_settings": {f"rad_rwkv{n}": {"window_tokens": 3, "sink_tokens": 1} for n in (6, 7)}},
}
B, T = 3, 5

mixers = pytest.mark.parametrize("mixer", TIME_MIXERS)
switches = pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)


def config_of(mixer, switches):
    return RadladsConfig(**SIZES, **HEADS, time_mixers=[mixer] * 2, **switches)


def held_tensors(layer):
    """The tensors that a cache's layer holds, by name."""
    if isinstance(layer, RecurrentCacheLayer):
        return {name: x for name, x in layer.state._asdict().items() if x is not None}
    return {"keys": layer.keys, "values": layer.values}


@mixers
@switches
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_declared_state_is_the_state_after_a_prompt(mixer, switches, dtype):
    config = config_of(mixer, switches)
    model, cache = RadladsForCausalLM(config).to(dtype).eval(), RadladsCache(config)
    model(torch.randint(96, (B, T)), past_key_values=cache)
    for index, layer in enumerate(cache.layers):
        declared, held = mixer_class(mixer).state_tensors(config, index), held_tensors(layer)
        assert declared.keys() == held.keys()
        for name, x in held.items():
            first, rest = declared[name].shape[:1], declared[name].shape[1:]
            expected = (B, *first, T, *rest) if declared[name].per_token else (B, *first, *rest)
            assert tuple(x.shape) == expected, name
            assert x.dtype == (declared[name].dtype or dtype), name
    assert cache.state_bytes() == B * state_bytes(config, T, dtype.itemsize)


@mixers
@switches
def test_the_declared_weights_are_the_matrices(mixer, switches):
    config = config_of(mixer, switches)
    with torch.device("meta"):
        model = RadladsForCausalLM(config)
    for layer, block in enumerate(model.model.layers):
        matrices = [x.numel() for x in block.self_attn.parameters() if x.numel() > max(x.shape)]
        counted = mixer_class(mixer).product_weights(config, layer)
        assert counted.at_input + counted.inside == sum(matrices)


@mixers
@switches
def test_costs_are_positive_and_of_every_layer(mixer, switches):
    config, kind = config_of(mixer, switches), mixer_class(mixer)
    for layer in range(config.num_hidden_layers):
        assert kind.mixing_flops(config, layer, 100.0) > 0
        assert kind.kept_bytes(config, layer, wide=True) >= kind.kept_bytes(config, layer, wide=False) > 0
        assert kind.backward_bytes(config, layer) > 0


@mixers
@switches
def test_what_is_taken_from_the_teacher_is_there(mixer, switches):
    with torch.device("meta"):
        kind = mixer_class(mixer)
        own = {name.partition(".")[0] for name, _ in kind(config_of(mixer, switches), 0).named_parameters()}
    optional = set() if switches.get("qk_norm") else {"q_norm", "k_norm"}
    assert set(kind.from_teacher) - optional <= own
