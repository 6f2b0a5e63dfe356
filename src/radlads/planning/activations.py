"""Bytes per token that a forward pass keeps for the backward pass, and that the backward pass adds, from the shapes.

What is kept is what torch.compile's partitioner keeps of Block.mixed and Block.feed, together with the recurrence's
own (`rwkv7_triton.forward_keeping`). C hidden size, D = H * N, H heads, N head size, F the channel mixer's size.
`wide`: mixed precision, where the residual stream is fp32 and weights are rounded to bf16 for every product.
"""

from radlads.model.configuration import RadladsConfig
from radlads.model.rwkv7_triton import BFLOAT16


def residual(config: RadladsConfig, *, wide: bool) -> int:
    """The residual stream once."""
    return (4 if wide else 2) * config.hidden_size


def mixer_kept(config: RadladsConfig, layer: int, *, wide: bool) -> float:
    """What a recurrent layer's time mixer keeps, its normed input included, the residual stream before it not."""
    C, D = config.hidden_size, config.num_attention_heads * config.head_dim
    # k before it is repeated over groups, the output, and what the output projection reads
    common = 2 * C + 2 * config.num_key_value_heads * config.head_dim + 2 * D
    if config.gate_rank_type:
        common += 2 * D + 2 * D + (2 * config.lora_rank_gate if config.gate_rank_type == 2 else 0)
    if config.groupnorm_att:
        common += 8 * config.num_attention_heads
    own = _rwkv7_kept if config.time_mixers[layer] == "rad_rwkv7" else _rwkv6_kept
    return common + own(config, layer, wide=wide)


def _rwkv7_kept(config: RadladsConfig, layer: int, *, wide: bool) -> float:
    H, N = config.num_attention_heads, config.head_dim
    D, L = H * N, BFLOAT16.chunk
    # r, a, v, k, kappa and the decay's low-rank product in bf16, log w in fp32, the norm of each head's removal key
    kept: float = 6 * 2 * D + 4 * D + 2 * (config.lora_rank_decay + config.lora_rank_iclr) + 4 * H
    kept += 2 * D if wide else 0  # a before and after it is rounded
    if layer != config.first_value_layer:
        kept += 2 * D + 2 * config.num_key_value_heads * N + 2 * config.lora_rank_value_residual_mix
    # forward_keeping: u, two matrices of 2 L rows, mixes, the states met and the chunks' ends
    return kept + H * (2 * (5 * N + 2 * L + N * N / L) + 4 * N / L)


def _rwkv6_kept(config: RadladsConfig, layer: int, *, wide: bool) -> float:
    C, H, N = config.hidden_size, config.num_attention_heads, config.head_dim
    D, L = H * N, BFLOAT16.chunk
    # r, k, v and the decay's low-rank product in bf16, log w in fp32
    kept: float = 4 * 2 * D + 4 * D + 2 * config.lora_rank_decay
    if config.use_tokenshift:
        # The step from the token before, and five mixes of both with the shares that made them
        kept += 2 * C + 5 * (2 * C + 2 * C + 2 * config.lora_rank_tokenshift)
    # A kernel that keeps its states as RAD-RWKV7's does: two matrices of L rows, mixes, states and the chunks' ends
    return kept + H * (2 * (2 * N + L + N * N / L) + 4 * N / L)


def channel_mixer_kept(config: RadladsConfig) -> int:
    """What a channel mixer keeps: its normed input, gate(x) and up(x)."""
    return 2 * config.hidden_size + 2 * 2 * config.intermediate_size


def mixer_backward(config: RadladsConfig, layer: int) -> float:
    """What going back through a recurrence adds when all its gradients are there, less what is kept no longer."""
    H, N = config.num_attention_heads, config.head_dim
    D = H * N
    freed = 2 * D * (3 if config.gate_rank_type else 1)
    if config.time_mixers[layer] == "rad_rwkv7":
        # d_out, dq and the states' gradients; gradients of r, k, v, kappa, a and, in fp32, of log w
        return 2 * D + 2 * H * (N + N * N / BFLOAT16.chunk) + 5 * 2 * D + 4 * D - freed
    # d_out and the states' gradients; gradients of r, k, v and, in fp32, of log w
    return 2 * D + 2 * H * N * N / BFLOAT16.chunk + 3 * 2 * D + 4 * D - freed


def channel_mixer_backward(config: RadladsConfig) -> int:
    """What going back through a channel mixer adds: the gradients of their product, of gate(x) and of up(x)."""
    return 3 * 2 * config.intermediate_size


def teacher_forward(config: RadladsConfig) -> int:
    """What a frozen block holds at most: the residual stream, its norm, gate(x), up(x) and their product."""
    return 2 * 2 * config.hidden_size + 3 * 2 * config.intermediate_size
