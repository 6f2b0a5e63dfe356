"""The teacher rounded to 8 bits: what is rounded, how much that changes, and what stays as it was."""

import tiny
import torch
from tolerances import FP8, relative_error
from torch import nn

from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student, build_teacher
from radlads.distill.fp8_teacher import Fp8Linear, fp8_copy
from radlads.train.fit import run_stage

CPU = torch.device("cpu")
IDS = torch.arange(60).view(2, 30) % tiny.VOCAB


def test_a_product_of_rounded_numbers_is_near_the_exact_one():
    torch.manual_seed(0)
    linear, x = nn.Linear(96, 64), torch.randn(2, 5, 96)
    x[0, 0] *= 1e4  # a token of large values costs the others nothing
    exact, found = linear(x), Fp8Linear(linear, CPU, torch.float32)(x)
    errors = torch.linalg.vector_norm(found - exact, dim=-1) / torch.linalg.vector_norm(exact, dim=-1)
    assert found.dtype == torch.float32
    assert 1e-3 < errors.max() < FP8


def test_rows_of_zeros_stay_zero():
    linear = nn.Linear(32, 16, bias=False)
    assert torch.equal(Fp8Linear(linear, CPU, torch.float32)(torch.zeros(1, 2, 32)), torch.zeros(1, 2, 16))


def test_only_the_blocks_matrices_are_rounded(teacher):
    exact = build_teacher(open_teacher(teacher))
    before = {name: value.clone() for name, value in exact.state_dict().items()}
    copy = fp8_copy(exact, CPU, torch.float32)
    rounded = {name for name, module in copy.named_modules() if isinstance(module, Fp8Linear)}
    layers = exact.model.layers.named_modules(prefix="model.layers")
    assert rounded == {name for name, module in layers if isinstance(module, nn.Linear)}
    kept = [name for name in before if name.rpartition(".")[0] not in rounded]
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(kept)
    assert all(torch.equal(copy.state_dict()[name], before[name]) for name in kept)
    assert all(torch.equal(value, before[name]) for name, value in exact.state_dict().items())
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    with torch.no_grad():
        error = relative_error(copy(IDS, use_cache=False).logits, exact(IDS, use_cache=False).logits)
    assert 1e-3 < error < FP8


def test_a_stage_learns_from_the_rounded_teacher_and_leaves_it_whole(teacher, corpus_folder, tmp_path):
    exact = build_teacher(open_teacher(teacher))
    before = {name: value.clone() for name, value in exact.state_dict().items()}

    def losses(precision):
        config = tiny.stage_config(corpus_folder, "align", **{"train.teacher_precision": precision})
        torch.manual_seed(0)
        student, _ = build_student(open_teacher(teacher), config.model)
        result = run_stage(config, student, exact, tmp_path / precision, tiny.Silent(), parent="test")
        rows = (result.folder / "metrics.csv").read_text().splitlines()
        column = rows[0].split(",").index("loss")
        return torch.tensor([float(row.split(",")[column]) for row in rows[1:]])

    same, rounded = losses("same"), losses("fp8")
    drift = (rounded / same - 1).abs()
    assert 0 < drift.max() < FP8
    assert all(torch.equal(value, before[name]) for name, value in exact.state_dict().items())
