"""What FSDP2 moves and keeps while a sharded student aligns, in one process that has the others' part made up."""

from collections import Counter

import pytest
import tiny
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from radlads.convert.hf_source import open_teacher
from radlads.convert.student import student_blueprint, teacher_blueprint
from radlads.distill.align import Align
from radlads.distill.stage import is_trainable
from radlads.train.engines.sharding import build_sharded, settle
from radlads.train.optimizers.step import backward_parts

CPU = torch.device("cpu")
LAYERS = 3
GATHERED, REDUCED = torch.ops.c10d._allgather_base_, torch.ops.c10d._reduce_scatter_base_


class Moved(TorchDispatchMode):
    """Counts operators."""

    def __enter__(self):
        self.counts = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def mesh():
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


@pytest.mark.parametrize(("mixer", "again"), [("rad_rwkv7", 1), ("rad_rwkv6", 0)])
def test_a_batch_gathers_each_mixer_once_and_leaves_none_whole(teacher, tmp_path, mesh, mixer, again):
    """But for the first values' mixer, whose backward pass comes last."""
    source, stage = open_teacher(teacher), Align()
    config = tiny.stage_config(tmp_path, "align", **{"model.tmix": mixer})
    built = [
        build_sharded(blueprint, mesh, CPU, dtype=torch.float32, mixers_run_alone=alone)[0]
        for blueprint, alone in ((student_blueprint(source, config.model), True), (teacher_blueprint(source), False))
    ]
    student, frozen = built
    frozen.requires_grad_(False)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(is_trainable(name, student, "mixer"))
    for model in built:
        settle(model)
    with Moved() as moved:
        backward_parts(stage, student, frozen, torch.zeros(1, 9, dtype=torch.long))
    assert (
        moved.counts[GATHERED] == 1 + LAYERS + LAYERS + again
    )  # the teacher's embedding and blocks, the student's mixers
    assert moved.counts[REDUCED] == LAYERS
    assert all(isinstance(parameter, DTensor) for model in built for parameter in model.parameters())
    with Moved() as moved, torch.no_grad():
        student(torch.zeros(1, 9, dtype=torch.long), use_cache=False)
    assert moved.counts[GATHERED] == 2 + 2 * LAYERS  # embedding with norm, head, mixers and the rest of blocks
    assert all(isinstance(parameter, DTensor) for parameter in student.parameters())
