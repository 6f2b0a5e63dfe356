"""Whether torch.export is tracing: an exported graph must fit every input, and must derive its own gradients."""

import torch


def is_exporting() -> bool:
    """True inside torch.export, strict or not; False when torch.compile traces.

    torch.compiler.is_exporting says the same, but torch 2.11 compiles it as True: compiled training
    then ran without our kernels and without the savings of memory. The flag behind it is right everywhere.
    """
    return bool(torch.compiler._is_exporting_flag)
