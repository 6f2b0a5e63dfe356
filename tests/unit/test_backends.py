"""The choice of a recurrence's backend, and its refusals: one sentence each, with the remedy.

GPU tensors are fakes: they have a device, a shape and a dtype, but no memory, so nothing may run on them.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from radlads.model import recurrence

KERNELS = {"rwkv7": ("triton", "fla"), "gla": ("fla", "triton")}
NUM_INPUTS = {"rwkv7": 6, "gla": 4}
DISPATCH = {"rwkv7": recurrence.rwkv7, "gla": recurrence.gla}

everything = pytest.mark.parametrize(
    ("kind", "backend"), [(kind, backend) for kind, backends in KERNELS.items() for backend in backends]
)


@pytest.fixture(autouse=True)
def hopper_with_all_packages(monkeypatch):
    """Every test starts from a machine on which all backends run, and takes something away."""
    monkeypatch.setattr(recurrence, "capability", lambda index: (9, 0))
    monkeypatch.setattr(recurrence, "fla_is_importable", lambda: True)
    monkeypatch.setattr(recurrence, "triton", object())


def values(device="cuda", T=70, N=64, dtype=torch.bfloat16):
    with FakeTensorMode():
        return torch.empty(2, T, 3, N, device=device, dtype=dtype)


def chosen(kind, v, backend="auto"):
    return recurrence.choose_backend(backend, v, KERNELS[kind])


def refusal(kind, backend, v):
    """The message with which the recurrence itself refuses, which must be one sentence."""
    with pytest.raises(ValueError) as caught:
        DISPATCH[kind](*[v] * NUM_INPUTS[kind], backend=backend)
    message = str(caught.value)
    assert "\n" not in message and ". " not in message and not message.endswith(".")
    return message


def test_automatic_choice_on_a_gpu():
    assert chosen("rwkv7", values()) == "triton"
    assert chosen("gla", values()) == "fla"


@pytest.mark.parametrize("kind", KERNELS)
def test_automatic_choice_of_a_single_token_and_on_a_cpu(kind):
    assert chosen(kind, values(T=1)) == "reference"
    assert chosen(kind, values("cpu")) == "chunked"


@everything
def test_a_backend_asked_for_is_taken(kind, backend):
    assert chosen(kind, values(), backend) == chosen(kind, values(T=1), backend) == backend


def test_automatic_choice_without_triton_or_fla(monkeypatch):
    monkeypatch.setattr(recurrence, "triton", None)
    assert chosen("rwkv7", values()) == "fla"
    monkeypatch.setattr(recurrence, "fla_is_importable", lambda: False)
    assert chosen("rwkv7", values()) == chosen("gla", values()) == "chunked"


def test_automatic_choice_without_fla(monkeypatch):
    monkeypatch.setattr(recurrence, "fla_is_importable", lambda: False)
    assert chosen("gla", values()) == "triton"


def test_automatic_choice_for_other_head_sizes():
    assert chosen("rwkv7", values(N=32)) == "fla"


@pytest.mark.parametrize("kind", KERNELS)
def test_automatic_choice_on_an_old_gpu(kind, monkeypatch):
    monkeypatch.setattr(recurrence, "capability", lambda index: (7, 5))
    assert chosen(kind, values()) == "chunked"


@everything
def test_no_gpu(kind, backend):
    expected = f"the {backend} backend needs a CUDA GPU, but the tensors are on cpu: choose 'auto'"
    assert refusal(kind, backend, values("cpu")) == expected


@everything
def test_gpu_too_old(kind, backend, monkeypatch):
    monkeypatch.setattr(recurrence, "capability", lambda index: (7, 5))
    message = refusal(kind, backend, values())
    assert "compute capability 8.0" in message and message.endswith("choose 'chunked'")


def test_fla_not_installed(monkeypatch):
    monkeypatch.setattr(recurrence, "fla_is_importable", lambda: False)
    for kind in KERNELS:
        assert (
            refusal(kind, "fla", values()) == "fla-core is not installed: pip install 'radlads[gpu]', or choose 'auto'"
        )


def test_triton_not_installed(monkeypatch):
    monkeypatch.setattr(recurrence, "triton", None)
    message = refusal("rwkv7", "triton", values())
    assert message == "triton is not installed: pip install 'radlads[gpu]', or choose 'auto'"


def test_head_sizes_of_the_triton_kernels():
    for N in (64, 128):
        assert chosen("rwkv7", values(N=N), "triton") == "triton"
    message = refusal("rwkv7", "triton", values(N=32))
    assert message == "the triton backend has kernels for head sizes 64 and 128, not 32: choose 'auto'"
