"""Every registered time mixer under every switch: the contract of docs/architecture.md, shapes and initial values.

Shape letters: B batch, T tokens, C hidden size, D = H * N, H heads, N head size.
"""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from tolerances import BFLOAT16, MIXER, SPLIT, relative_error

from radlads.model.cache import RadladsCache
from radlads.model.configuration import RadladsConfig
from radlads.model.contracts import SharedInputs
from radlads.model.layers import rope_tables
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.registry import TIME_MIXERS, build_time_mixer

T = 21
BALANCED = {"balance_state": True, "groupnorm_att": False}
NORMED = {"balance_state": False, "groupnorm_att": True}
RWKV6 = {"use_tokenshift": True, "gate_rank_type": 1, "use_rope": False, **BALANCED}
VARIANTS = {"qwen2": ("qwen2", {})}
for variant, switches in (("balanced", BALANCED), ("normed", NORMED)):
    for gate in (0, 1, 2):
        for rope in (True, False):
            name = f"rwkv7-{variant}-gate{gate}-{'rope' if rope else 'nope'}"
            VARIANTS[name] = ("rad_rwkv7", {"gate_rank_type": gate, "use_rope": rope, **switches})
for name, on in (("both", True), ("neither", False)):
    VARIANTS[f"rwkv7-{name}-gate2-rope"] = ("rad_rwkv7", {"balance_state": on, "groupnorm_att": on})
VARIANTS["rwkv6"] = ("rad_rwkv6", RWKV6)
for change in (
    {"use_tokenshift": False},
    {"gate_rank_type": 0},
    {"gate_rank_type": 2},
    {"use_rope": True},
    {"balance_state": False},
    {"groupnorm_att": True},
    {"use_tokenshift": False, "gate_rank_type": 2, "use_rope": True, **NORMED},
):
    VARIANTS["rwkv6-" + "-".join(f"{key}={value:d}" for key, value in change.items())] = ("rad_rwkv6", RWKV6 | change)
for name, window in (("window", {"window_tokens": 5, "sink_tokens": 2}), ("window-no-sinks", {"window_tokens": 8})):
    for mixer, switches in (("rad_rwkv7", BALANCED), ("rad_rwkv7", NORMED), ("rad_rwkv6", RWKV6)):
        key = f"{mixer.removeprefix('rad_')}-{'normed-' if switches is NORMED else ''}{name}"
        VARIANTS[key] = (mixer, {"mixer_settings": {mixer: window}, **switches})

variants = pytest.mark.parametrize("variant", VARIANTS)
recurrent_variants = pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "qwen2"])


def tiny_config(mixer, **changes):
    sizes = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "time_mixers": [mixer] * 3,
    }
    return RadladsConfig(**(sizes | changes))


def variant_config(variant, **changes):
    mixer, switches = VARIANTS[variant]
    return tiny_config(mixer, **(switches | changes))


def perturbed(module):
    """The module with every parameter moved, so that no low-rank factor or bias is zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Run:
    """A perturbed mixer of the second of three layers, with inputs for two sequences."""

    def __init__(self, variant, num_tokens=T):
        self.config = variant_config(variant)
        self.mixer = perturbed(build_time_mixer(self.config, 1))
        self.x = torch.randn(2, num_tokens, self.config.hidden_size)
        self.v_first = torch.randn(2, num_tokens, self.config.num_attention_heads, self.config.head_dim)

    def shared(self, start, stop):
        causal = torch.ones(stop, stop, dtype=torch.bool).tril()[None, None, start:]
        return SharedInputs(*rope_tables(self.config, torch.arange(start, stop)[None]), attention_mask=causal)

    def __call__(self, boundaries=(), mixer=None):
        """Outputs and the state of a pass in pieces with carried state."""
        cache, outs = RadladsCache(self.config), []
        for start, stop in pairwise((0, *boundaries, self.x.shape[1])):
            piece = self.x[:, start:stop], cache.load(1), self.v_first[:, start:stop], self.shared(start, stop)
            y, state, _ = (mixer or self.mixer)(*piece)
            cache.store(1, state, stop - start)
            outs.append(y)
        return torch.cat(outs, dim=1), cache.load(1)


def test_every_registered_mixer_is_tested():
    assert {mixer for mixer, _ in VARIANTS.values()} == set(TIME_MIXERS)


def published(config, p, x, v_first):
    """The paper's equations for one sequence [T, C], token by token, from parameters by name: output and state."""
    rwkv7, H, N = "w0" in p, config.num_attention_heads, config.head_dim
    heads = lambda y: y.view(len(y), -1, N)  # noqa: E731
    x_r, x_k, x_v, x_w, x_g = [x] * 5 if "time_maa_x" not in p else published_token_shift(p, x)
    r, k, v = (
        heads(y @ p[f"{name}_proj.weight"].T + p[f"{name}_proj.bias"])
        for name, y in (("q", x_r), ("k", x_k), ("v", x_v))
    )
    turned = published_rope(r, 1e6), published_rope(k, 1e6)[:, [0, 0, 1, 1]]
    if config.use_rope:
        r, k = published_rope(r, 1e6), published_rope(k, 1e6)
    k, v = k[:, [0, 0, 1, 1]], v[:, [0, 0, 1, 1]]
    soft = window_of_each_token(*turned, v, config.settings_of(1))
    if rwkv7:
        a = heads(torch.sigmoid(p["a0"][0] + x @ p["a1"] @ p["a2"]))
        w = heads(torch.exp(-math.exp(-0.5) * torch.sigmoid(p["w0"][0] + torch.tanh(x @ p["w1"]) @ p["w2"])))
        v = v + (v_first - v) * heads(torch.sigmoid(p["v0"][0] + x @ p["v1"] @ p["v2"]))
        if config.balance_state:
            kappa, k = k / k.norm(dim=-1, keepdim=True), k * (1 - w + a)
        else:
            kappa, k = k * heads(p["k_k"][0]), k * (1 + (a - 1) * heads(p["k_a"][0]))
            kappa = kappa / kappa.norm(dim=-1, keepdim=True)
    else:
        low = torch.tanh(x_w @ p["time_decay_w1"]) @ p["time_decay_w2"]
        w = heads(torch.exp(torch.maximum(-torch.exp(p["time_decay"][0] + low), torch.tensor(-5.0))))
        k = k * (1 - w) if config.balance_state else k
    o, states = torch.empty_like(r), []
    for h in range(H):
        S = torch.zeros(N, N, dtype=x.dtype)
        for t in range(len(x)):
            if rwkv7:
                removed = torch.outer(kappa[t, h], a[t, h] * kappa[t, h])
                S = S @ (torch.diag(w[t, h]) - removed) + torch.outer(v[t, h], k[t, h])
                o[t, h] = S @ r[t, h]
            else:
                S = torch.diag(w[t, h]) @ S + torch.outer(k[t, h], v[t, h])
                o[t, h] = r[t, h] @ S
        states.append(S)
    if not (rwkv7 and config.groupnorm_att):
        o = o * N**-0.5
    if config.groupnorm_att:
        o = (o - o.mean(-1, keepdim=True)) / (o.var(-1, correction=0, keepdim=True) + N * 1e-5).sqrt()
        o = o * heads(p["ln_x.weight"][None]) + heads(p["ln_x.bias"][None])
    gates = {0: lambda: 1.0, 1: lambda: torch.sigmoid(x_g @ p["gate.weight"].T)}
    gates[2] = lambda: torch.sigmoid(x_g @ p["g1"]) @ p["g2"]
    out = gates[config.gate_rank_type]() * o.flatten(1)
    if config.settings_of(1).window_tokens:
        out = p["window_scale"] * soft.flatten(1) + p["recurrent_scale"] * out
    return out @ p["o_proj.weight"].T, torch.stack(states)


def window_of_each_token(q, k, v, settings):
    """Softmax attention of [T, H, N] over the last window_tokens and the first sink_tokens, token by token."""
    out = torch.zeros_like(v)
    for t in range(len(v)):
        seen = [s for s in range(t + 1) if s > t - settings.window_tokens or s < settings.sink_tokens]
        if settings.window_tokens:
            scores = torch.einsum("hn,shn->hs", q[t], k[seen]) / q.shape[-1] ** 0.5
            out[t] = torch.einsum("hs,shn->hn", scores.softmax(-1), v[seen])
    return out


def published_token_shift(p, x):
    """x_r, x_k, x_v, x_w and x_g."""
    delta = torch.cat([torch.zeros_like(x[:1]), x[:-1]]) - x
    low = torch.tanh((x + delta * p["time_maa_x"][0]) @ p["time_maa_w1"]).chunk(5, dim=-1)
    return [x + delta * (p[f"time_maa_{c}"][0] + low[i] @ p["time_maa_w2"][i]) for i, c in enumerate("rkvwg")]


def published_rope(y, base):
    """Channel pairs (n, n + N/2) of [T, heads, N] as complex numbers, turned by t * base^(-2n/N)."""
    half = y.shape[-1] // 2
    speed = base ** (-torch.arange(half, dtype=y.dtype) / half)
    turn = torch.exp(1j * torch.arange(len(y), dtype=y.dtype)[:, None, None] * speed)
    turned = torch.complex(y[..., :half], y[..., half:]) * turn
    return torch.cat([turned.real, turned.imag], dim=-1)


@recurrent_variants
def test_mixer_is_the_published_equations(variant):
    run = Run(variant)
    if variant.startswith("rwkv6"):
        run.mixer.time_decay.data[..., ::2] += 4.0  # some channels reach the clamp at -5
    y, state = run()
    weights = {name: parameter.detach().double() for name, parameter in run.mixer.named_parameters()}
    for row in range(2):
        expected, last = published(run.config, weights, run.x[row].double(), run.v_first[row].double())
        assert relative_error(y[row], expected) < MIXER
        assert relative_error(state.wkv[row], last) < MIXER


@pytest.mark.parametrize("balance_state", [False, True])
@pytest.mark.parametrize("groupnorm_att", [False, True])
def test_rwkv7_output_is_scaled_unless_it_is_normed(balance_state, groupnorm_att):
    """A first token alone, by hand: its state is v k^T, so that its output is v (k . r)."""
    config = tiny_config("rad_rwkv7", gate_rank_type=0, balance_state=balance_state, groupnorm_att=groupnorm_att)
    mixer, x = perturbed(build_time_mixer(config, 0)), torch.randn(2, 1, 64)
    heads = {name: getattr(mixer, f"{name}_proj")(x).view(2, -1, 16).double() for name in "qkv"}
    r, k, v = heads["q"], heads["k"].repeat_interleave(2, 1), heads["v"].repeat_interleave(2, 1)
    a = torch.sigmoid(mixer.a0 + x @ mixer.a1 @ mixer.a2).view(2, 4, 16)
    w = torch.exp(-math.exp(-0.5) * torch.sigmoid(mixer.w0 + torch.tanh(x @ mixer.w1) @ mixer.w2)).view(2, 4, 16)
    k = k * (1 - w + a) if balance_state else k * (1 + (a - 1) * mixer.k_a.view(4, 16))
    out = v * (k * r).sum(-1, keepdim=True)
    if groupnorm_att:
        out = F.group_norm(out.flatten(1), 4, mixer.ln_x.weight.double(), mixer.ln_x.bias.double(), eps=16e-5)
    else:
        out = out / 4
    y, _, _ = mixer(x, None, None, SharedInputs(*rope_tables(config, torch.arange(1)[None])))
    assert relative_error(y[:, 0], out.flatten(1) @ mixer.o_proj.weight.T.double()) < MIXER


@variants
@pytest.mark.parametrize("boundaries", [(1,), (20,), (7,), (1, 2, 3, 11), tuple(range(1, T))], ids=str)
def test_splitting_changes_nothing(variant, boundaries):
    run = Run(variant)
    whole, state = run()
    pieces, carried = run(boundaries)
    assert relative_error(pieces, whole) < SPLIT
    if variant != "qwen2":
        assert relative_error(carried.wkv, state.wkv) < SPLIT


@variants
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 63, 64, 65, 67])
def test_odd_lengths_keep_shape_and_are_causal(variant, num_tokens):
    run = Run(variant, num_tokens)
    with torch.no_grad():
        y, _ = run()
        run.x[:, -1] += 1.0
        changed, _ = run()
    assert y.shape == run.x.shape
    assert not torch.allclose(changed[:, -1], y[:, -1])
    if num_tokens > 1:
        assert relative_error(changed[:, :-1], y[:, :-1]) < SPLIT


@variants
def test_rows_of_a_batch_are_independent(variant):
    run = Run(variant)
    both, _ = run()
    for row in range(2):
        single = Run(variant)
        single.x, single.v_first = run.x[row : row + 1], run.v_first[row : row + 1]
        assert relative_error(single(mixer=run.mixer)[0][0], both[row]) < SPLIT


@variants
def test_gradients_reach_every_parameter(variant):
    run = Run(variant)
    y, _ = run()
    (y * torch.randn_like(y)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in run.mixer.named_parameters()}
    if run.config.gate_rank_type == 0:
        gradients.pop("time_maa_g", None)  # mixes the gate's input: stored, but idle without a gate
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert (gradient != 0).float().mean() > 0.7, name  # a fifth of time_maa_w1 and _w2 is the gate's


@recurrent_variants
def test_gradients_flow_through_the_carried_state(variant):
    run = Run(variant)
    run.x.requires_grad_()
    y, _ = run((9,))
    y[:, 9:].sum().backward()
    assert (run.x.grad[:, 0] != 0).any()


@variants
def test_autocast_bf16_is_close_to_fp32(variant):
    run = Run(variant)
    expected, _ = run()
    with torch.autocast("cpu", torch.bfloat16):
        actual, state = run((8,))
    assert actual.dtype == torch.bfloat16
    assert relative_error(actual, expected) < BFLOAT16
    if variant != "qwen2":
        assert state.wkv.dtype == torch.float32


@variants
def test_gqa_repeats_whole_heads(variant):
    grouped = Run(variant)
    ungrouped = build_time_mixer(variant_config(variant, num_key_value_heads=4), 1)
    weights = dict(grouped.mixer.state_dict())
    for projection in ("k_proj", "v_proj"):
        for kind in ("weight", "bias"):
            heads = weights[f"{projection}.{kind}"].unflatten(0, (2, 16))
            weights[f"{projection}.{kind}"] = torch.stack([heads[0], heads[0], heads[1], heads[1]]).flatten(0, 1)
    ungrouped.load_state_dict(weights)
    assert relative_error(grouped(mixer=ungrouped)[0], grouped()[0]) < SPLIT


def test_v_first_is_set_by_the_first_rwkv7_layer_and_mixed_in_by_later_ones():
    run = Run("rwkv7-balanced-gate2-rope")
    first = perturbed(build_time_mixer(run.config, 0))
    _, _, v_first = first(run.x, None, None, run.shared(0, T))
    values = first.v_proj(run.x).unflatten(-1, (2, 16))
    assert relative_error(v_first, values[:, :, [0, 0, 1, 1]]) < SPLIT

    y, _, passed_on = run.mixer(run.x, None, run.v_first, run.shared(0, T))
    assert passed_on is run.v_first
    other, _, _ = run.mixer(run.x, None, -run.v_first, run.shared(0, T))
    assert not torch.allclose(y, other, rtol=1e-2)


def test_first_value_layer_need_not_be_the_first_layer():
    model = RadladsForCausalLM(tiny_config("x", time_mixers=["qwen2", "rad_rwkv7", "rad_rwkv7"]))
    names = set(model.state_dict())
    assert "model.layers.1.self_attn.v0" not in names
    assert "model.layers.2.self_attn.v0" in names


@pytest.mark.parametrize("variant", ["rwkv6", "rwkv7-balanced-gate2-rope", "rwkv7-normed-gate2-rope"])
@pytest.mark.parametrize(("gate", "share", "margin"), [(1, 0.5, 1e-5), (2, 0.0, 0.1)])
def test_a_fresh_gate_halves_or_nearly_silences(variant, gate, share, margin):
    """Full rank: g = 1/2. Low rank: random signs of a few per cent, so that the mixer starts almost silent."""
    run = Run(variant)
    gated, ungated = (build_time_mixer(variant_config(variant, gate_rank_type=g), 1) for g in (gate, 0))
    gated.load_state_dict(ungated.state_dict(), strict=False)
    ratio = (run(mixer=gated)[0].square().mean() / run(mixer=ungated)[0].square().mean()).sqrt().item()
    assert ratio == pytest.approx(share, abs=margin)
    assert ratio > 0


# Sizes that all differ: C = 40, D = 4 * 12 = 48, D_kv = 2 * 12 = 24, ranks 3, 5, 6, 7, 9
SIZES = {
    "hidden_size": 40,
    "head_dim": 12,
    "lora_rank_tokenshift": 3,
    "lora_rank_decay": 5,
    "lora_rank_iclr": 6,
    "lora_rank_value_residual_mix": 7,
    "lora_rank_gate": 9,
}
PROJECTIONS = {
    "q_proj.weight": (48, 40),
    "q_proj.bias": (48,),
    "k_proj.weight": (24, 40),
    "k_proj.bias": (24,),
    "v_proj.weight": (24, 40),
    "v_proj.bias": (24,),
    "o_proj.weight": (40, 48),
}
GATES = {0: {}, 1: {"gate.weight": (48, 40)}, 2: {"g1": (40, 9), "g2": (9, 48)}}
GROUP_NORM = {"ln_x.weight": (48,), "ln_x.bias": (48,)}
KEY_SCALES = {"k_k": (1, 1, 48), "k_a": (1, 1, 48)}
VALUE_RESIDUAL = {"v0": (1, 1, 48), "v1": (40, 7), "v2": (7, 48)}
RWKV7_SHAPES = {
    "w0": (1, 1, 48),
    "w1": (40, 5),
    "w2": (5, 48),
    "a0": (1, 1, 48),
    "a1": (40, 6),
    "a2": (6, 48),
}
RWKV6_SHAPES = {"time_decay": (1, 1, 48), "time_decay_w1": (40, 5), "time_decay_w2": (5, 48)}
TOKEN_SHIFT = {
    "time_maa_x": (1, 1, 40),
    "time_maa_r": (1, 1, 40),
    "time_maa_k": (1, 1, 40),
    "time_maa_v": (1, 1, 40),
    "time_maa_w": (1, 1, 40),
    "time_maa_g": (1, 1, 40),
    "time_maa_w1": (40, 15),
    "time_maa_w2": (5, 3, 40),
}


def shapes(mixer):
    return {name: tuple(parameter.shape) for name, parameter in mixer.named_parameters()}


def test_softmax_parameters():
    assert shapes(build_time_mixer(tiny_config("qwen2", **SIZES), 1)) == PROJECTIONS


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("normed", [False, True])
def test_rwkv7_parameters(gate, layer, normed):
    config = tiny_config("rad_rwkv7", gate_rank_type=gate, **SIZES, **(NORMED if normed else BALANCED))
    expected = PROJECTIONS | RWKV7_SHAPES | GATES[gate]
    expected |= VALUE_RESIDUAL if layer else {}
    expected |= GROUP_NORM | KEY_SCALES if normed else {}
    assert shapes(build_time_mixer(config, layer)) == expected


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("use_tokenshift", [False, True])
@pytest.mark.parametrize("groupnorm_att", [False, True])
def test_rwkv6_parameters(gate, use_tokenshift, groupnorm_att):
    config = tiny_config(
        "rad_rwkv6", gate_rank_type=gate, use_tokenshift=use_tokenshift, groupnorm_att=groupnorm_att, **SIZES
    )
    expected = PROJECTIONS | RWKV6_SHAPES | GATES[gate]
    expected |= TOKEN_SHIFT if use_tokenshift else {}
    expected |= GROUP_NORM if groupnorm_att else {}
    assert shapes(build_time_mixer(config, 1)) == expected


def test_low_ranks_are_those_of_the_published_7b_model():
    config = RadladsConfig(hidden_size=3584, num_attention_heads=28, time_mixers=["qwen2"] * 24)
    kinds = ("decay", "iclr", "value_residual_mix", "gate", "tokenshift")
    assert [getattr(config, f"lora_rank_{kind}") for kind in kinds] == [96, 96, 64, 416, 96]


def fresh_mixers(mixer, **switches):
    """The mixers of a whole model, so that transformers' own initialisation has had its turn."""
    model = RadladsForCausalLM(tiny_config(mixer, num_attention_heads=4, **switches))
    return [block.self_attn for block in model.model.layers]


def test_rwkv7_initial_values():
    mixers = fresh_mixers("rad_rwkv7", **NORMED)
    for layer, exponent in enumerate((0.85, 0.85 + 0.5**0.5, 1.85)):
        expected = torch.tensor([-6.5 + 5 * (n / 63) ** exponent for n in range(64)])
        assert torch.allclose(mixers[layer].w0.flatten(), expected, atol=1e-6)
    constants = {"a0": 0, "v0": 1, "k_k": 0.85, "k_a": 1, "w1": 0, "a1": 0, "v1": 0, "g1": 0}
    constants |= {"ln_x.weight": 1, "ln_x.bias": 0}
    for name, value in constants.items():
        assert (mixers[1].get_parameter(name) == value).all(), name
    for name in ("w2", "a2", "v2", "g2"):
        factor = mixers[1].get_parameter(name)
        assert torch.allclose(factor @ factor.T, 0.01 * torch.eye(len(factor)), atol=1e-6), name


def test_rwkv6_initial_values():
    mixers = fresh_mixers("rad_rwkv6", **RWKV6)
    for layer, exponent in enumerate((0.7, 1.35, 2.0)):
        expected = torch.tensor([-6 + 5 * (n / 63) ** exponent for n in range(64)])
        assert torch.allclose(mixers[layer].time_decay.flatten(), expected, atol=1e-6)
    zeros = ["time_maa_r", "time_maa_k", "time_maa_v", "time_maa_w", "time_maa_g", "time_maa_w1", "time_decay_w1"]
    for name in (*zeros, "gate.weight"):
        assert not mixers[1].get_parameter(name).any(), name
    assert (mixers[1].time_maa_x == 1).all()
    for name in ("time_maa_w2", "time_decay_w2"):
        assert 0.009 < mixers[1].get_parameter(name).abs().max() <= 0.01, name
