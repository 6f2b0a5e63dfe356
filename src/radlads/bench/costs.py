"""Bytes and arithmetic that reading a prompt, decoding and recurrences cannot do without, counted from the shapes.

What a kernel adds is not counted. Training steps are counted in distill/arithmetic.py.
"""

from radlads.distill.arithmetic import forward_flops, head_flops
from radlads.model.configuration import RadladsConfig


def prefill_flops(config: RadladsConfig, sequence_tokens: int) -> float:
    """FLOPs per token of reading a prompt, whose last token alone needs the head."""
    return forward_flops(config, sequence_tokens) + head_flops(config) / sequence_tokens


def decode_state_bytes(config: RadladsConfig, context_tokens: int, bytes_per_value: int) -> int:
    """Bytes moved per sequence and decoded token: a state is read and written, but what it has of every token, as keys
    and values are, is read."""
    return sum(
        (1 if tensor.per_token else 2) * tensor.num_bytes(context_tokens, bytes_per_value)
        for layer in range(config.num_hidden_layers)
        for tensor in config.mixer_class(layer).state_tensors(config, layer).values()
    )


def recurrence_bytes(kernel: str, shape_BTHN: tuple[int, int, int, int], *, backward: bool) -> int:
    """Bytes a recurrence moves at least: bf16 inputs, fp32 log decay and bf16 output once, and the same gradients.

    The backward pass reads the inputs again and the output's gradient, and writes the inputs' gradients.
    """
    B, T, H, N = shape_BTHN
    inputs = 4 + 2 * {"gla": 3, "rwkv7": 5}[kernel]
    per_element = inputs + 2 + (inputs + 2 + inputs if backward else 0)
    return B * T * H * N * per_element
