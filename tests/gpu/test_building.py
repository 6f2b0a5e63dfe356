"""Models are built on the GPU they train on: tensor by tensor, and the same as on a CPU."""

import pytest
import stages
import torch
from gpu_comparison import DRY_RUN
from memory import Most, save_teacher
from tiny import stage_config, teacher_folder

from radlads.console import Silent
from radlads.convert.hf_source import open_teacher
from radlads.convert.student import student_blueprint, teacher_blueprint
from radlads.train.fit import run_stage
from radlads.train.placement import build_models
from radlads.train.processes.group import ALONE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DRY_RUN, reason="says nothing without a GPU")]
LARGEST_TENSOR = 8192 * 512 * 4
SLACK = 60_000_000


def build(folder, accelerator):
    config = stage_config(folder, "distill", **{"train.accelerator": accelerator, "train.precision": "fp32"})
    source = open_teacher(folder / "teacher")
    torch.manual_seed(0)
    return build_models(config, student_blueprint(source, config.model), teacher_blueprint(source), ALONE)


def test_the_models_are_those_of_a_cpu_and_the_host_holds_neither(tmp_path):
    save_teacher(tmp_path / "teacher")
    torch.zeros(1, device="cuda")  # the context takes memory of its own
    with Most() as held:
        found = build(tmp_path, "gpu")
    expected = build(tmp_path, "cpu")
    both = 0
    for one, other in ((found.student, expected.student), (found.teacher, expected.teacher)):
        for mine, its in zip(one.parameters(), other.parameters(), strict=True):
            assert mine.is_cuda
            assert mine.cpu().equal(its)
            both += its.nbytes
    assert held.num_bytes < 2 * LARGEST_TENSOR + SLACK < both / 4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_stage_leaves_its_models_where_it_found_them(tmp_path, device):
    teacher = teacher_folder(tmp_path / "teacher", heads=1)
    config = stage_config(tmp_path, "distill", **{"train.accelerator": "gpu", "train.my_exit_tokens": 512})
    source = open_teacher(teacher)
    student = student_blueprint(source, config.model).build(device=device)[0]
    frozen = teacher_blueprint(source).build(device=device)[0].requires_grad_(False)
    stages.corpus(tmp_path)
    run_stage(config, student, frozen, tmp_path / "done", Silent(), parent="")
    for model in (student, frozen):
        assert {each.device.type for each in model.parameters()} == {device}
