"""Mixers by name: ours, their published aliases, and a user's own file on the import path."""

import sys
import textwrap

import pytest
import torch
from tolerances import PADDING, SPLIT, relative_error

from radlads.model.cache import RadladsCache
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.rad_rwkv6 import RadRwkv6
from radlads.model.rad_rwkv7 import RadRwkv7
from radlads.model.registry import build_time_mixer, is_registered

RUNNING_SUM = """
    from typing import NamedTuple

    import torch
    from torch import nn


    class State(NamedTuple):
        total: torch.Tensor


    class TMix_myown(nn.Module):
        def __init__(self, config, layer_idx):
            super().__init__()
            self.out = nn.Linear(config.hidden_size, config.hidden_size)

        def forward(self, x, state, v_first, shared):
            total = x.cumsum(dim=1) + (0 if state is None else state.total[:, None])
            return self.out(torch.tanh(total)), State(total[:, -1]), v_first
"""
SCALE = """
    from torch import nn


    class CMix_myown(nn.Module):
        def __init__(self, config, layer_idx):
            super().__init__()
            self.out = nn.Linear(config.hidden_size, config.hidden_size)

        def forward(self, x):
            return self.out(x)
"""


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """Drops `folder/folder_name.py` on the import path; forgets what was imported from there afterwards."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(folder, name, source):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{folder}_{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")

    yield write
    for module in [name for name in sys.modules if name.partition(".")[0] in ("tmix", "cmix")]:
        del sys.modules[module]


def tiny_config(**changes):
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    return RadladsConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **changes)


def assert_generates_with_cache(model):
    torch.manual_seed(0)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    prompt = torch.randint(1, 97, (2, 7))
    cached, plain = (model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize(("alias", "mixer"), [("qwerky6", RadRwkv6), ("qwerky7", RadRwkv7)])
def test_published_names_are_aliases(alias, mixer):
    config = tiny_config(time_mixers=[alias] * 3)
    assert type(build_time_mixer(config, 0)) is mixer
    assert is_registered(config)
    config.time_mixers = [alias] * 3  # set behind the configuration's back
    assert type(build_time_mixer(config, 0)) is mixer


@pytest.mark.parametrize(
    ("kind", "known", "path"),
    [
        ("time_mixers", "qwen2, rad_rwkv6, rad_rwkv7", "tmix/tmix_nosuch.py"),
        ("channel_mixers", "qwen2, swiglu", "cmix/cmix_nosuch.py"),
    ],
)
def test_unknown_name_is_one_sentence_with_the_known_names(kind, known, path):
    with pytest.raises(ValueError) as error:
        RadladsForCausalLM(tiny_config(**{kind: ["nosuch"] * 3}))
    assert str(error.value) == f"no mixer named 'nosuch': use one of {known}, or put {path} on the import path"


def test_unknown_name_beside_a_plug_in_is_still_the_same_sentence(plug_in):
    plug_in("tmix", "myown", RUNNING_SUM)
    with pytest.raises(ValueError, match="no mixer named 'nosuch'"):
        RadladsForCausalLM(tiny_config(time_mixers=["myown", "nosuch", "qwen2"]))


def test_a_time_mixer_of_the_users_own(plug_in):
    plug_in("tmix", "myown", RUNNING_SUM)
    config = tiny_config(time_mixers=["rad_rwkv7", "myown", "qwen2"])
    model = RadladsForCausalLM(config)
    assert type(model.model.layers[1].self_attn).__name__ == "TMix_myown"
    assert not is_registered(config)
    assert_generates_with_cache(model)


def test_a_time_mixers_own_state_survives_a_split_and_beam_operations(plug_in):
    plug_in("tmix", "myown", RUNNING_SUM)
    model = RadladsForCausalLM(tiny_config(time_mixers=["myown"] * 3)).eval()
    ids, cache = torch.randint(1, 97, (2, 9)), RadladsCache(model.config)
    with torch.no_grad():
        model(ids[:, :4], past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        end = model(ids[[1, 0], 4:], past_key_values=cache).logits
        assert relative_error(end, model(ids[[1, 0]]).logits[:, 4:]) < SPLIT
    assert cache.state_bytes() == 3 * 2 * 64 * 4


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_a_users_dropout_is_the_same_where_it_is_recomputed(plug_in, mode):
    plug_in("tmix", "myown", RUNNING_SUM.replace("torch.tanh(total)", "nn.functional.dropout(torch.tanh(total))"))
    torch.manual_seed(0)
    model = RadladsForCausalLM(tiny_config(time_mixers=["myown"] * 3)).train()
    ids, gradients = torch.randint(1, 97, (2, 9)), []
    for each in ("none", mode):
        model.set_activation_checkpointing(each)
        torch.manual_seed(1)
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        model.zero_grad()
    assert all(torch.equal(found, expected) for expected, found in zip(*gradients, strict=True))


def test_a_time_mixer_of_the_users_own_sees_zeros_at_padding(plug_in):
    plug_in("tmix", "myown", RUNNING_SUM)
    model = RadladsForCausalLM(tiny_config(time_mixers=["myown"] * 3)).eval()
    ids = torch.randint(1, 97, (2, 9))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]] * 2)
    with torch.no_grad():
        padded, plain = model(ids, attention_mask=mask).logits[:, 3:], model(ids[:, 3:]).logits
    assert relative_error(padded, plain) < PADDING


def test_a_channel_mixer_of_the_users_own(plug_in):
    plug_in("cmix", "myown", SCALE)
    model = RadladsForCausalLM(tiny_config(channel_mixers=["swiglu", "myown", "swiglu"]))
    assert type(model.model.layers[1].mlp).__name__ == "CMix_myown"
    assert_generates_with_cache(model)


@pytest.mark.parametrize(("folder", "prefix", "kind"), [("tmix", "TMix", "time"), ("cmix", "CMix", "channel")])
def test_a_plug_in_with_another_class_name_is_a_clear_error(plug_in, folder, prefix, kind):
    plug_in(folder, "myown", "class Myown: ...")
    with pytest.raises(ValueError, match=rf"{folder}_myown\.py must define a class {prefix}_myown"):
        RadladsForCausalLM(tiny_config(**{f"{kind}_mixers": ["myown"] * 3}))


def test_a_plug_in_whose_own_import_fails_shows_that_error(plug_in):
    plug_in("tmix", "myown", "import a_package_nobody_has")
    with pytest.raises(ModuleNotFoundError, match="a_package_nobody_has"):
        RadladsForCausalLM(tiny_config(time_mixers=["myown"] * 3))


@pytest.mark.parametrize("kind", ["time_mixers", "channel_mixers"])
def test_one_name_per_layer(kind):
    with pytest.raises(ValueError, match="one mixer for each of the 3 layers"):
        tiny_config(**{kind: ["qwen2"] * 2})


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_attention_heads must be a multiple"):
        RadladsConfig(hidden_size=60, num_attention_heads=4, num_key_value_heads=3)
    with pytest.raises(ValueError, match=r"gate_rank_type must be 0 .* not 3"):
        RadladsConfig(gate_rank_type=3)
