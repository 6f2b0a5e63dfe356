"""What Triton 3.6's interpreter lacks to run our kernels."""

import numpy as np
import pytest
import triton.language as tl
import triton.runtime.interpreter as interpreter


def with_runtime_loops(patch):
    """The interpreter's patch of tensors, mended: loops whose bounds are kernel arguments make arrays of them, which
    newer numpy does not take for numbers."""

    def patch_and_mend(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch_and_mend


def with_bf16_products(create_dot):
    """The interpreter's matrix product, mended: it multiplies the bits of bf16 numbers as if they were integers."""

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    return lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest)


def allow_runtime_loops(patch: pytest.MonkeyPatch) -> None:
    """From now on kernels with runtime loops run, and those that multiply in bf16."""
    patch.setattr(interpreter, "_patch_lang_tensor", with_runtime_loops(interpreter._patch_lang_tensor))
    builder = interpreter.InterpreterBuilder
    patch.setattr(builder, "create_dot", with_bf16_products(builder.create_dot))


@pytest.fixture
def runtime_loops(monkeypatch):
    """Kernels with runtime loops run."""
    allow_runtime_loops(monkeypatch)
