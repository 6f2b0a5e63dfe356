"""The choice of a recurrence's backend, and its refusals: one sentence each, with the remedy.

GPU tensors are fakes: they have a device, a shape and a dtype, but no memory, so nothing may run on them.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from radlads.model import recurrence

NUM_INPUTS = {"rwkv7": 6, "gla": 4}
DISPATCH = {"rwkv7": recurrence.rwkv7, "gla": recurrence.gla}

kinds = pytest.mark.parametrize("kind", DISPATCH)
kernels = pytest.mark.parametrize("backend", ["triton", "fla"])
chosen = recurrence.choose_backend


@pytest.fixture(autouse=True)
def hopper_with_all_packages(monkeypatch):
    """Every test starts from a machine on which all backends run, and takes something away."""
    monkeypatch.setattr(recurrence, "capability", lambda index: (9, 0))
    monkeypatch.setattr(recurrence, "fla_is_importable", lambda: True)
    monkeypatch.setattr(recurrence, "triton", object())


def values(device="cuda", T=70, N=64, dtype=torch.bfloat16):
    with FakeTensorMode():
        return torch.empty(2, T, 3, N, device=device, dtype=dtype)


def refusal(kind, backend, v):
    """The message with which the recurrence itself refuses, which must be one sentence."""
    with pytest.raises(ValueError) as caught:
        DISPATCH[kind](*[v] * NUM_INPUTS[kind], backend=backend)
    message = str(caught.value)
    assert "\n" not in message and ". " not in message and not message.endswith(".")
    return message


def test_automatic_choice():
    assert chosen("auto", values()) == "triton"
    assert chosen("auto", values(T=1)) == "reference"
    assert chosen("auto", values("cpu")) == "chunked"


@kernels
def test_a_backend_asked_for_is_taken(backend):
    assert chosen(backend, values()) == chosen(backend, values(T=1)) == backend


def test_automatic_choice_without_triton_or_fla(monkeypatch):
    monkeypatch.setattr(recurrence, "triton", None)
    assert chosen("auto", values()) == "fla"
    monkeypatch.setattr(recurrence, "fla_is_importable", lambda: False)
    assert chosen("auto", values()) == "chunked"


def test_automatic_choice_for_other_head_sizes():
    assert chosen("auto", values(N=32)) == "fla"


def test_automatic_choice_on_an_old_gpu(monkeypatch):
    monkeypatch.setattr(recurrence, "capability", lambda index: (7, 5))
    assert chosen("auto", values()) == "chunked"


@kinds
@kernels
def test_no_gpu(kind, backend):
    expected = f"the {backend} backend needs a CUDA GPU, but the tensors are on cpu: choose 'auto'"
    assert refusal(kind, backend, values("cpu")) == expected


@kinds
@kernels
def test_gpu_too_old(kind, backend, monkeypatch):
    monkeypatch.setattr(recurrence, "capability", lambda index: (7, 5))
    message = refusal(kind, backend, values())
    assert "compute capability 8.0" in message and message.endswith("choose 'chunked'")


def test_fla_not_installed(monkeypatch):
    monkeypatch.setattr(recurrence, "fla_is_importable", lambda: False)
    for kind in DISPATCH:
        assert (
            refusal(kind, "fla", values()) == "fla-core is not installed: pip install 'radlads[gpu]', or choose 'auto'"
        )


def test_triton_not_installed(monkeypatch):
    monkeypatch.setattr(recurrence, "triton", None)
    message = refusal("rwkv7", "triton", values())
    assert message == "triton is not installed: pip install 'radlads[gpu]', or choose 'auto'"


def test_head_sizes_of_the_triton_kernels():
    for N in (64, 128):
        assert chosen("triton", values(N=N)) == "triton"
    message = refusal("rwkv7", "triton", values(N=32))
    assert message == "the triton backend has kernels for head sizes 64 and 128, not 32: choose 'auto'"
