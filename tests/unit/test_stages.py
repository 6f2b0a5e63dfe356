"""What each stage trains, and that part-wise backward equals one backward through the whole."""

import csv
import weakref

import pytest
import tiny
import torch

from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student, build_teacher
from radlads.distill.heldout import measure
from radlads.distill.logits import build_stage
from radlads.distill.losses import alignment
from radlads.distill.stage import is_trainable
from radlads.train.fit import run_stage

MIXED = {"model.tmix": "rad_rwkv7", "model.tmix2": "qwen2", "model.inv_other_layer_ratio": 3}


def models(teacher, folder, stage, **overrides):
    config = tiny.stage_config(folder, stage, **overrides)
    source = open_teacher(teacher)
    torch.manual_seed(0)
    return config, build_student(source, config.model)[0], build_teacher(source)


@pytest.mark.parametrize("mixer", ["rad_rwkv6", "rad_rwkv7"])
@pytest.mark.parametrize(
    ("stage", "trainable", "trains", "stays"),
    [
        ("align", "auto", ["self_attn"], ["mlp", "layernorm", "embed_tokens", "lm_head", "model.norm"]),
        ("distill", "auto", ["self_attn", "mlp", "layernorm", "embed_tokens", "lm_head", "model.norm"], []),
        ("extend", "auto", ["self_attn", "mlp", "layernorm", "embed_tokens", "lm_head", "model.norm"], []),
        ("extend", "decay", [".w0", ".w1", ".w2", "time_decay", "time_maa"], ["q_proj", "g1", "a0", "mlp", "lm_head"]),
    ],
)
def test_which_parameters_change(teacher, corpus_folder, tmp_path, mixer, stage, trainable, trains, stays):
    keys = {"model.tmix": mixer, "train.trainable": trainable, "train.lr_init": 1e-2}
    config, student, frozen = models(teacher, corpus_folder, stage, **keys)
    for parameter in student.parameters():  # so that no gradient is zero because a low-rank factor still is
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    before = {name: value.clone() for name, value in student.named_parameters()}
    frozen_before = {name: value.clone() for name, value in frozen.named_parameters()}
    run_stage(config, student, frozen, tmp_path / "run", tiny.Silent(), parent="test")
    changed = {name for name, value in student.named_parameters() if not torch.equal(value, before[name])}
    assert all(any(word in name for word in trains) for name in changed)
    assert not [name for name in changed if any(word in name for word in stays)]
    expected = {name for name in before if any(word in name for word in trains)}
    assert expected == changed
    assert all(torch.equal(value, frozen_before[name]) for name, value in frozen.named_parameters())


def test_softmax_layers_of_a_mixed_stack_do_not_align(teacher, corpus_folder):
    config, student, frozen = models(teacher, corpus_folder, "align", **MIXED)
    tokens = torch.randint(256, (2, 9))
    names = {part.name for part in build_stage(config.train).parts(student, frozen, tokens)}
    assert names == {"layer_0", "layer_1"}
    assert not is_trainable("model.layers.2.self_attn.q_proj.weight", student, "mixer")


@pytest.mark.parametrize("kept", [0, 1])
def test_the_alignment_loss_is_a_mean_over_all_layers(teacher, corpus_folder, tmp_path, kept):
    keys = {"model.preserve_last_n_layers": kept, "train.log_every_n_steps": 1, "train.my_exit_tokens": 1}
    config, student, frozen = models(teacher, corpus_folder, "align", **keys)
    run_stage(config, student, frozen, tmp_path / "run", tiny.Silent(), parent="test")
    with open(tmp_path / "run" / "metrics.csv") as file:
        (row,) = csv.DictReader(file)
    layers = [float(row[f"layer_{layer}"]) for layer in range(3 - kept)]
    assert float(row["loss"]) == pytest.approx(sum(layers) / 3, rel=1e-6)


def test_backward_part_by_part_gives_the_gradients_of_the_whole(teacher, corpus_folder):
    config, student, frozen = models(teacher, corpus_folder, "align")
    for parameter in student.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    tokens = torch.randint(256, (2, 20))
    for part in build_stage(config.train).parts(student, frozen, tokens):
        part.objective.backward()
    by_parts = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)
    whole, v_first = 0, None
    for tap in list(frozen.model.attention_taps(tokens[:, :-1])):
        y, _, v_first = student.model.layers[tap.layer].self_attn(tap.x, None, v_first, tap.shared)
        whole = whole + alignment(tap.y, y, "l2")
    whole.backward()
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(by_parts[name], parameter.grad, rtol=1e-4, atol=1e-5)
    assert by_parts["model.layers.0.self_attn.v_proj.weight"].abs().max() > 0


def test_align_leaves_alone_what_it_does_not_need(teacher, corpus_folder):
    config, student, frozen = models(teacher, corpus_folder, "align")
    student.lm_head = student.model.embed_tokens = None
    tokens = torch.randint(256, (1, 9))
    assert len(list(build_stage(config.train).parts(student, frozen, tokens))) == 3


def test_aligning_runs_no_channel_mixer_of_the_last_layer(teacher, corpus_folder):
    config, student, frozen = models(teacher, corpus_folder, "align")
    frozen.model.layers[2].mlp = frozen.model.norm = frozen.lm_head = None
    assert len(list(build_stage(config.train).parts(student, frozen, torch.randint(256, (1, 9))))) == 3


def test_a_layers_graph_is_gone_after_its_part(teacher, corpus_folder):
    config, student, frozen = models(teacher, corpus_folder, "align")
    kept = {}
    for layer in (1, 2):
        student.model.layers[layer].self_attn.o_proj.register_forward_hook(
            lambda module, arguments, output, layer=layer: kept.update({f"layer_{layer}": weakref.ref(arguments[0])})
        )
    for part in build_stage(config.train).parts(student, frozen, torch.randint(256, (1, 9))):
        if part.name in kept:
            assert kept[part.name]() is not None
            part.objective.backward()
            assert kept[part.name]() is None
    assert len(kept) == 2


def test_an_identical_student_has_no_kl_and_full_agreement(teacher):
    frozen = build_teacher(open_teacher(teacher))
    twin = build_teacher(open_teacher(teacher))
    result = measure(twin, frozen, [torch.randint(256, (2, 17))])
    assert result.kl == pytest.approx(0, abs=1e-6)
    assert (result.top1, result.num_tokens) == (1.0, 32)


def test_heldout_loss_is_transformers_own(teacher):
    frozen = build_teacher(open_teacher(teacher))
    tokens = torch.randint(256, (2, 17))
    expected = frozen(tokens, labels=tokens).loss.item()
    assert measure(frozen, None, [tokens[:1], tokens[1:]]).loss == pytest.approx(expected, rel=1e-5)


def test_extending_with_a_teacher_mixes_kl_and_cross_entropy(teacher, corpus_folder):
    keys = {"train.teacher.hf_path": str(teacher), "train.teacher.kl_weight": 0.25, "train.teacher.ce_weight": 0.75}
    _, student, frozen = models(teacher, corpus_folder, "extend", **keys)
    tokens = torch.randint(256, (2, 9))
    parts = [
        float(
            next(
                build_stage(tiny.stage_config(corpus_folder, "extend", **kind).train).parts(student, frozen, tokens)
            ).sum
        )
        for kind in (
            keys,
            {**keys, "train.teacher.kl_weight": 1.0, "train.teacher.ce_weight": 0.0},
            {**keys, "train.teacher.kl_weight": 0.0, "train.teacher.ce_weight": 1.0},
        )
    ]
    assert parts[0] == pytest.approx(0.25 * parts[1] + 0.75 * parts[2], rel=1e-5)
