"""What a GPU refuses, in one sentence with the remedy, and what the automatic choice does instead."""

import pytest
import torch
from gpu_comparison import BACKENDS, DEVICE, DISPATCH, DRY_RUN, INPUTS, require
from tolerances import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DRY_RUN, reason="a CPU refuses otherwise: see unit/test_backends.py")]

KERNELS = [(kind, backend) for kind, backends in BACKENDS.items() for backend in backends if backend != "chunked"]


def inputs(kind, T=20, N=64, device=DEVICE):
    shapes = [(2, T, 2, N)] * (len(INPUTS[kind]) - 1) + [(2, 2, N, N)]
    generator = torch.Generator().manual_seed(0)
    drawn = dict(zip(INPUTS[kind], (0.1 * torch.randn(shape, generator=generator) for shape in shapes), strict=True))
    drawn["log_w"] = -drawn["log_w"].abs()
    return [x.to(device) for x in drawn.values()]


def test_the_triton_backend_names_its_head_sizes():
    require("triton")
    with pytest.raises(ValueError, match=r"head sizes 64 and 128, not 32: choose 'auto'$"):
        DISPATCH["rwkv7"](*inputs("rwkv7", N=32), backend="triton")


@pytest.mark.parametrize(("kind", "backend"), KERNELS)
def test_tensors_left_on_the_cpu_are_refused(kind, backend):
    with pytest.raises(ValueError, match=r"needs a CUDA GPU, but the tensors are on cpu: choose 'auto'$"):
        DISPATCH[kind](*inputs(kind, device="cpu"), backend=backend)


@pytest.mark.parametrize("kind", BACKENDS)
def test_other_head_sizes_run_by_themselves(kind):
    given = inputs(kind, N=16)
    out, _ = DISPATCH[kind](*given)
    expected, _ = DISPATCH[kind](*given, backend="reference")
    assert relative_error(out, expected) < 2e-3  # fla's products are TF32
