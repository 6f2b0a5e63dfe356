"""Whether vLLM can serve a model: asked of its mixers. What vLLM itself makes of one is in tests/vllm_plugin."""

from pathlib import Path

import pytest
import tiny

from radlads.model import registry
from radlads.model.configuration import RadladsConfig
from radlads.model.rad_rwkv7 import RadRwkv7
from radlads.model.registry import obstacles
from radlads.recipes.vllm_check import parallel_sizes, vllm_verdict


@pytest.mark.parametrize(
    ("changed", "reasons"),
    [
        ({}, []),
        (
            {"time_mixers": ["rad_rwkv6", "qwen2", "rad_rwkv7"], "mixer_settings": {"rad_rwkv7": {"window_tokens": 4}}},
            [],
        ),
        ({"channel_mixers": ["swiglu", "mine", "swiglu"]}, ["mine is not made for it"]),
    ],
)
def test_what_vllm_cannot_serve(changed, reasons):
    assert obstacles(RadladsConfig(**tiny.SIZES | changed), "vLLM") == reasons


def test_a_subclass_is_not_served_by_vllm_as_its_base_is(monkeypatch):
    variant = type("Variant", (RadRwkv7,), {"title": "a variant"})
    monkeypatch.setitem(registry.TIME_MIXERS, "variant", variant)
    config = RadladsConfig(**tiny.SIZES | {"time_mixers": ["rad_rwkv7", "variant", "variant"]})
    can, lines = vllm_verdict(config, Path("run"))
    assert not can and lines == ["run: vLLM cannot serve this model", "- a variant is not made for it"]


def test_sizes_divide_heads_and_channels():
    sizes = {"num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944}
    assert parallel_sizes(RadladsConfig(**tiny.SIZES | sizes)) == [1, 2, 4]
