"""What Triton 3.6's interpreter lacks to run our kernels."""

import pytest
import triton.runtime.interpreter as interpreter


@pytest.fixture
def runtime_loops(monkeypatch):
    """Loops whose bounds are kernel arguments: the interpreter makes arrays of them that newer numpy does not take for
    numbers."""
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_and_mend)
