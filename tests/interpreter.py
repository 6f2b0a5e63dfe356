"""What Triton 3.6's interpreter lacks to run our kernels."""

import pytest
import triton.runtime.interpreter as interpreter


def with_runtime_loops(patch):
    """The interpreter's patch of tensors, mended: loops whose bounds are kernel arguments make arrays of them, which
    newer numpy does not take for numbers."""

    def patch_and_mend(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch_and_mend


def allow_runtime_loops(patch: pytest.MonkeyPatch) -> None:
    """From now on kernels with runtime loops run."""
    patch.setattr(interpreter, "_patch_lang_tensor", with_runtime_loops(interpreter._patch_lang_tensor))


@pytest.fixture
def runtime_loops(monkeypatch):
    """Kernels with runtime loops run."""
    allow_runtime_loops(monkeypatch)
