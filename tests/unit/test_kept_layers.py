"""A student with the teacher's attention put back into some layers: its configuration, weights and mixers."""

import itertools
from dataclasses import replace

import pytest
import tiny
import torch

from radlads.checkpoint.model_folder import load_model, save_model
from radlads.checkpoint.weights import ModelWeights
from radlads.config.load import load_config
from radlads.convert.blueprint import stored_blueprint
from radlads.convert.hf_source import open_teacher
from radlads.convert.kept_layers import KeptWeights, kept_blueprint, kept_config, kept_student
from radlads.convert.student import build_student, build_teacher, student_config
from radlads.selection.swap import SwappedStudent

SUBSETS = [kept for number in range(4) for kept in itertools.combinations(range(3), number)]
STACKS = {
    "rad_rwkv7": {},
    "rad_rwkv6": {"model.tmix": "rad_rwkv6"},
    "both": {"model.layer_mixers": "0:rad_rwkv6"},
    "windows": {"model.mixer.window_tokens": 8, "model.mixer.sink_tokens": 2},
}


@pytest.fixture(scope="module")
def source(teacher):
    return open_teacher(teacher)


@pytest.fixture(scope="module")
def softmax(source):
    return build_teacher(source)


def student_of(source, **keys):
    """A student whose mixers alone have moved, as aligning leaves it."""
    torch.manual_seed(0)
    student, _ = build_student(source, load_config([], {"model.groupnorm_att": 0, **keys}).model)
    for name, parameter in student.named_parameters():
        if ".self_attn." in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return student


def tokens(rows=2, number=37):
    return torch.randint(256, (rows, number), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("layers", SUBSETS)
def test_the_configuration_is_that_of_a_student_made_with_these_layers(source, stack, layers):
    student = student_config(source.config, load_config([], STACKS[stack]).model)
    model = load_config([], STACKS[stack] | {"model.softmax_layers": list(layers)}).model
    if stack == "both" and 0 in layers:  # layer_mixers win over softmax_layers
        model = load_config([], {"model.softmax_layers": list(layers)}).model
    if stack == "windows" and len(layers) == 3:  # no mixer is left that has the setting
        model = replace(model, mixer={})
    assert kept_config(student, layers).to_dict() == student_config(source.config, model).to_dict()


@pytest.mark.parametrize("stack", STACKS)
@torch.no_grad()
def test_a_swapped_student_is_the_model_that_is_built_with_these_layers(source, softmax, tmp_path, stack):
    student = student_of(source, **STACKS[stack])
    save_model(student, tmp_path)
    swapped = SwappedStudent(student, softmax)
    for layers in SUBSETS:
        built, _ = kept_blueprint(stored_blueprint(tmp_path), source.weights, layers, tmp_path).build()
        expected = built.eval()(tokens()).logits
        for kept in itertools.chain.from_iterable(itertools.combinations(layers, n) for n in range(len(layers) + 1)):
            hidden = swapped.hidden(swapped.trace(tokens(), kept), layers)
            torch.testing.assert_close(student.lm_head(hidden), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(kept_student(student, softmax, layers)(tokens()).logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_aligned_student_that_keeps_all_layers_has_the_teachers_logits(source, softmax):
    student = student_of(source)
    expected = softmax(tokens()).logits
    assert not torch.allclose(student(tokens()).logits, expected, atol=1e-2)
    torch.testing.assert_close(kept_student(student, softmax, range(3))(tokens()).logits, expected, atol=1e-5, rtol=0)


def test_each_weight_is_the_teachers_or_the_students_own(source, softmax):
    student = student_of(source)
    kept = dict(kept_student(student, softmax, [0]).named_parameters())
    own, others = dict(student.named_parameters()), dict(softmax.named_parameters())
    from_teacher = {name for name in kept if name.startswith("model.layers.0.self_attn.")}
    assert all(torch.equal(kept[name], others[name]) for name in from_teacher) and len(from_teacher) == 7
    assert all(torch.equal(kept[name], own[name]) for name in kept.keys() - from_teacher)
    # Layer 1 makes the first values now, and mixes in none
    gone = {name for name in own.keys() - kept.keys() if not name.startswith("model.layers.0.")}
    assert gone == {f"model.layers.1.self_attn.{name}" for name in ("v0", "v1", "v2")}


def test_a_copy_is_on_its_own(source, softmax, tmp_path):
    student = student_of(source)
    kept = kept_student(student, softmax, [1])
    before = kept(tokens()).logits
    for model in (student, softmax):
        assert not {id(x) for x in model.parameters()} & {id(x) for x in kept.parameters()}
    save_model(kept, tmp_path)
    torch.testing.assert_close(load_model(tmp_path)(tokens()).logits, before, atol=0, rtol=0)


def test_no_random_number_is_drawn(source, softmax):
    student = student_of(source)
    state = torch.get_rng_state()
    kept_student(student, softmax, [0])
    swapped = SwappedStudent(student, softmax)
    swapped.hidden(swapped.trace(tokens(), ()), (0,))
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_that_are_missing_are_named(source, softmax):
    student = student_of(source)
    config = kept_config(student.config, [1])
    with pytest.raises(ValueError, match=r"^the teacher has no model\.layers\.1\.self_attn\.q_proj\.weight, which the"):
        KeptWeights(ModelWeights(student), ModelWeights(torch.nn.Linear(1, 1)), config, [1])
    with pytest.raises(ValueError, match=r"^the student has no model\.embed_tokens\.weight, which the"):
        KeptWeights(ModelWeights(torch.nn.Linear(1, 1)), ModelWeights(softmax), config, [1])


def test_families_with_norms_of_queries_and_keys(tmp_path):
    source = open_teacher(tiny.family_folder(tmp_path / "teacher", "qwen3-yarn"))
    softmax, student = build_teacher(source), student_of(source)
    with torch.no_grad():
        expected = softmax(tokens()).logits
        kept = kept_student(student, softmax, range(3))(tokens()).logits
        swapped = SwappedStudent(student, softmax)
        again = student.lm_head(swapped.hidden(swapped.trace(tokens(), ()), (0, 1, 2)))
    torch.testing.assert_close(kept, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=0)
