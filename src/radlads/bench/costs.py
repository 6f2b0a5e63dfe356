"""Bytes and arithmetic that reading a prompt, decoding and recurrences cannot do without, counted from the shapes.

What a kernel adds is not counted. Training steps are counted in distill/arithmetic.py.
"""

from radlads.distill.arithmetic import forward_flops, head_flops
from radlads.model.configuration import RadladsConfig, state_bytes


def prefill_flops(config: RadladsConfig, sequence_tokens: int) -> float:
    """FLOPs per token of reading a prompt, whose last token alone needs the head."""
    return forward_flops(config, sequence_tokens) + head_flops(config) / sequence_tokens


def decode_state_bytes(config: RadladsConfig, context_tokens: int, bytes_per_value: int) -> int:
    """Bytes moved per sequence and decoded token: recurrent states are read and written, keys and values read."""
    cached = config.num_hidden_layers - len(config.recurrent_layers)
    per_layer = 2 * config.num_key_value_heads * config.head_dim * context_tokens * bytes_per_value
    keys_and_values = cached * per_layer
    return keys_and_values + 2 * (state_bytes(config, context_tokens, bytes_per_value) - keys_and_values)


def recurrence_bytes(kernel: str, shape_BTHN: tuple[int, int, int, int], *, backward: bool) -> int:
    """Bytes a recurrence moves at least: bf16 inputs, fp32 log decay and bf16 output once, and the same gradients.

    The backward pass reads the inputs again and the output's gradient, and writes the inputs' gradients.
    """
    B, T, H, N = shape_BTHN
    inputs = 4 + 2 * {"gla": 3, "rwkv7": 5}[kernel]
    per_element = inputs + 2 + (inputs + 2 + inputs if backward else 0)
    return B * T * H * N * per_element
