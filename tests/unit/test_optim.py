"""Learning rates by step and group."""

import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import tiny
import torch
from fused_adam import FusedAdam

from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student
from radlads.train.optimizers import optim
from radlads.train.optimizers.optim import build_optimizers, learning_rate, weights_to_keep
from radlads.train.optimizers.step import optimizer_step


def settings(folder, **keys):
    return tiny.stage_config(folder, "distill", **{f"train.{key}": value for key, value in keys.items()}).train


def rates(train, role="rest", num_steps=1000):
    return [learning_rate(train, step, num_steps, role=role) for step in range(num_steps)]


@pytest.mark.parametrize("kind", ["cos", "linear", "exp", "oneminussqrt"])
def test_decays_run_from_first_to_last_and_never_rise(tmp_path, kind):
    values = rates(settings(tmp_path, lr_init=1e-3, lr_final=1e-5, lr_decay_type=kind))
    assert values[0] == 1e-3
    assert values[-1] == pytest.approx(1e-5, abs=2e-6)
    assert all(later <= earlier for earlier, later in pairwise(values))


@pytest.mark.parametrize(
    ("kind", "half_way"), [("cos", 0.7071), ("linear", 0.5), ("oneminussqrt", 1 - 0.5**0.5), ("exp", 0.1)]
)
def test_decays_half_way(tmp_path, kind, half_way):
    train = settings(tmp_path, lr_init=1.0, lr_final=1e-2 if kind == "exp" else 1e-12, lr_decay_type=kind)
    assert rates(train)[500] == pytest.approx(half_way, rel=1e-3)


def test_warm_up_rises_linearly_from_one_per_cent(tmp_path):
    values = rates(settings(tmp_path, lr_init=1e-3, lr_final=1e-3, warmup_steps=100))
    assert values[0] == pytest.approx(1e-5)
    assert values[50] == pytest.approx(1e-3 * 0.505)
    assert set(values[100:]) == {1e-3}


def test_stage_2a_holds_the_mixers_rate_then_drops_it(tmp_path):
    keys = {
        "lr_init": 1e-5,
        "lr_final": 1e-5,
        "lr2_init": 1e-4,
        "lr2_final": 1e-5,
        "lr_wait": 0.833,
        "lr_endpoint": 0.875,
    }
    train = settings(tmp_path, **keys)
    mixer = rates(train, "mixer")
    assert set(mixer[:833]) == {1e-4}
    assert mixer[880:] == pytest.approx([1e-5] * 120)
    assert rates(train) == pytest.approx([1e-5] * 1000)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_mixers_and_the_rest_are_different_groups(teacher, tmp_path, optimizer):
    config = tiny.stage_config(tmp_path, "distill", **{"train.optimizer": optimizer})
    student, _ = build_student(open_teacher(teacher), config.model)
    groups = [group for each in build_optimizers(student, config.train) for group in each.param_groups]
    sizes = {
        role: sum(p.numel() for g in groups if g["role"] == role for p in g["params"]) for role in ("mixer", "rest")
    }
    mixers = sum(p.numel() for name, p in student.named_parameters() if "self_attn" in name)
    assert sizes == {"mixer": mixers, "rest": sum(p.numel() for p in student.parameters()) - mixers}


def test_softmax_layers_that_are_kept_have_the_mixers_rate(teacher, tmp_path):
    config = tiny.stage_config(tmp_path, "distill", **{"model.preserve_last_n_layers": 1})
    student, _ = build_student(open_teacher(teacher), config.model)
    (optimizer,) = build_optimizers(student, config.train)
    found = {id(p) for group in optimizer.param_groups if group["role"] == "mixer" for p in group["params"]}
    assert found == {id(p) for name, p in student.named_parameters() if ".self_attn." in name}


def test_weight_decay_is_on_mixers_and_matrices(teacher, tmp_path):
    config = tiny.stage_config(tmp_path, "distill", **{"train.weight_decay": 0.1})
    student, _ = build_student(open_teacher(teacher), config.model)
    (optimizer,) = build_optimizers(student, config.train)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0.1 for p in group["params"]}
    others = {name for name, p in student.named_parameters() if id(p) not in decayed}
    assert others == {name for name, _ in student.named_parameters() if "norm" in name}


def test_muon_gets_the_blocks_matrices_and_nothing_else(teacher, tmp_path):
    config = tiny.stage_config(tmp_path, "distill", **{"train.optimizer": "muon"})
    student, _ = build_student(open_teacher(teacher), config.model)
    muon, adam = build_optimizers(student, config.train)
    names = {id(p): name for name, p in student.named_parameters()}
    by_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    by_adam = {names[id(p)] for group in adam.param_groups for p in group["params"]}
    assert "model.layers.0.mlp.up_proj.weight" in by_muon
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= by_adam
    assert by_muon.isdisjoint(by_adam)


def student_of(teacher, config):
    torch.manual_seed(0)
    return build_student(open_teacher(teacher), config.model)[0]


@pytest.mark.parametrize("optimizer", ["adamwschedulefree", "lion"])
def test_optimizers_from_packages_lower_the_loss(teacher, tmp_path, optimizer):
    losses = tiny.losses_by(optimizer, teacher, tmp_path, torch.empty(0))
    assert losses[-1] < losses[0] - 0.2


@pytest.fixture
def deepspeed(monkeypatch):
    """Puts an optimiser in the place of DeepSpeed's fused Adam, which a CPU may then have."""
    monkeypatch.setattr(optim, "_check_on_gpu", lambda groups, train: None)
    return lambda rule: monkeypatch.setitem(sys.modules, "deepspeed.ops.adam", SimpleNamespace(FusedAdam=rule))


def test_deepspeeds_adam_lowers_the_loss_as_adamw_does(teacher, tmp_path, deepspeed):
    deepspeed(FusedAdam)
    by_adamw, by_deepspeed = (
        tiny.losses_by(name, teacher, tmp_path, torch.empty(0)) for name in ("adamw", "dsfusedadamw")
    )
    assert by_deepspeed == pytest.approx(by_adamw, rel=1e-4)


def test_an_extension_that_cannot_be_built_is_one_sentence(teacher, tmp_path, deepspeed):
    def fails(*_, **__):
        raise ValueError("invalid literal for int() with base 10: '0a'")

    deepspeed(fails)
    with pytest.raises(ValueError, match=r"builds at first use, which failed here .*'0a'.* TORCH_CUDA_ARCH_LIST unset"):
        tiny.losses_by("dsfusedadamw", teacher, tmp_path, torch.empty(0))


def test_schedule_free_weights_are_averaged_to_be_kept(teacher, tmp_path):
    config = tiny.stage_config(tmp_path, "distill", **{"train.optimizer": "adamwschedulefree"})
    student = student_of(teacher, config)
    optimizers = build_optimizers(student, config.train)
    weight = student.lm_head.weight
    for scale in (1.0, -1.0):
        weight.grad = scale * torch.ones_like(weight)
        optimizer_step(optimizers, student.parameters(), count=1, clip_val=0.0)
    trained = weight.detach().clone()
    with weights_to_keep(optimizers):
        assert not torch.equal(weight, trained)
    torch.testing.assert_close(weight, trained)


@pytest.mark.parametrize(
    ("optimizer", "package", "module"),
    [("adamwschedulefree", "schedulefree", "schedulefree"), ("lion", "lion-pytorch", "lion_pytorch")],
)
def test_an_optimizer_whose_package_is_missing_is_named(teacher, tmp_path, monkeypatch, optimizer, package, module):
    monkeypatch.setitem(sys.modules, module, None)
    config = tiny.stage_config(tmp_path, "distill", **{"train.optimizer": optimizer})
    with pytest.raises(ValueError, match=f"'{optimizer}' needs {package}.*pip install {package}"):
        build_optimizers(student_of(teacher, config), config.train)


@pytest.mark.parametrize("optimizer", ["adam8bit", "dsfusedadamw"])
def test_an_optimizer_for_gpus_is_refused_on_a_cpu(teacher, tmp_path, optimizer):
    config = tiny.stage_config(tmp_path, "distill", **{"train.optimizer": optimizer})
    with pytest.raises(ValueError, match=f"'{optimizer}' needs a CUDA GPU: use adamw"):
        build_optimizers(student_of(teacher, config), config.train)


def weights_and_gradients(dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    weights = [torch.nn.Parameter(torch.randn(*shape, generator=generator).to(dtype)) for shape in ((4, 3), (5,))]
    for weight in weights:
        weight.grad = 7 * torch.randn(weight.shape, generator=generator).to(dtype)
    return weights


@pytest.mark.parametrize("clip_val", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_divides_clips_and_updates_as_torch_does(kind, clip_val):
    def optimizers(weights):
        if kind == "adamw":
            return [torch.optim.AdamW(weights, 1e-2, fused=True)]
        return [torch.optim.Muon(weights[:1], 1e-2), torch.optim.AdamW(weights[1:], 1e-2, fused=True)]

    found, expected = weights_and_gradients(), weights_and_gradients()
    norm = optimizer_step(optimizers(found), found, count=6, clip_val=clip_val).whole
    for weight in expected:
        weight.grad /= 6
    expected_norm = torch.nn.utils.clip_grad_norm_(expected, clip_val or float("inf"))
    for optimizer in optimizers(expected):
        optimizer.step()
    torch.testing.assert_close(norm, expected_norm)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
        assert a.grad is None


@pytest.mark.parametrize("bad", ["gradient", "loss"])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_goes_on(bad):
    found, expected = weights_and_gradients(), weights_and_gradients()
    optimizer, other = torch.optim.AdamW(found, 1e-2, fused=True), torch.optim.AdamW(expected, 1e-2, fused=True)
    before = [weight.detach().clone() for weight in found]
    if bad == "gradient":
        found[1].grad[2] = float("nan")
    sums = torch.tensor([1.0, float("inf") if bad == "loss" else 2.0])
    optimizer_step([optimizer], found, count=1, clip_val=1.0, sums=sums)
    assert all(torch.equal(weight, old) for weight, old in zip(found, before, strict=True))
    for weights, each in ((found, optimizer), (expected, other)):
        for weight, source in zip(weights, weights_and_gradients(), strict=True):
            weight.grad = source.grad
        optimizer_step([each], weights, count=1, clip_val=1.0)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_norm_of_bf16_gradients_is_fp32():
    weights = weights_and_gradients(torch.bfloat16)
    expected = torch.cat([weight.grad.float().flatten() for weight in weights]).norm()
    norm = optimizer_step([torch.optim.AdamW(weights, fused=True)], weights, count=1, clip_val=1.0).whole
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm, expected)


def test_the_norms_of_both_roles_make_the_whole():
    weights = weights_and_gradients()
    expected = {role: weight.grad.norm() / 3 for role, weight in zip(("rest", "mixer"), weights, strict=True)}
    groups = [{"params": [weight], "role": role} for role, weight in zip(("rest", "mixer"), weights, strict=True)]
    norms = optimizer_step([torch.optim.AdamW(groups, fused=True)], weights, count=3, clip_val=1e-3)
    assert list(norms.by_role) == ["mixer", "rest"]
    for role, norm in norms.by_role.items():
        torch.testing.assert_close(norm, expected[role])
    torch.testing.assert_close(norms.whole, torch.hypot(*norms.by_role.values()))
