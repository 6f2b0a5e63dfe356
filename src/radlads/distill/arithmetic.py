"""Arithmetic that a model's pass or a stage's step cannot do without, counted from the shapes. No tensor is touched.

C hidden size, D = H * N, H heads, N head size, F the channel mixer's size, V vocabulary. A product with a weight takes
2 FLOPs per weight and token; going back takes 2 for the weight's gradient and 2 for the input's.
"""

from dataclasses import dataclass

from radlads.model.configuration import RadladsConfig

# FLOPs per token, head and element of the [N, N] state, from the recurrences' equations: decay 1, write 2, read 2, and
# RAD-RWKV7's removal: find 2, take away 2
_STATE_FLOPS = {"rad_rwkv6": 5, "rad_rwkv7": 9}


@dataclass(frozen=True)
class MixerWeights:
    """Weights of one layer's time mixer that are multiplied with: by the layer's input, and further in."""

    at_input: int
    inside: int


def mixer_weights(config: RadladsConfig, layer: int) -> MixerWeights:
    """Matrices of a layer's time mixer, in weights."""
    C, N = config.hidden_size, config.head_dim
    D, D_kv = config.num_attention_heads * N, config.num_key_value_heads * N
    projections, output = C * (D + 2 * D_kv), D * C
    mixer = config.time_mixers[layer]
    if mixer == "qwen2":
        return MixerWeights(projections, output)
    ranks = config.lora_rank_decay + (config.lora_rank_gate if config.gate_rank_type == 2 else 0)
    if mixer == "rad_rwkv7":
        ranks += config.lora_rank_iclr
        ranks += 0 if layer == config.first_value_layer else config.lora_rank_value_residual_mix
    full_gate = C * D if config.gate_rank_type == 1 else 0
    at_input, inside = projections + full_gate + C * ranks, output + D * ranks
    if mixer == "rad_rwkv6" and config.use_tokenshift:
        # Every product has a trained mix of tokens before it
        return MixerWeights(0, at_input + inside + 2 * 5 * C * config.lora_rank_tokenshift)
    return MixerWeights(at_input, inside)


def mixing_flops(config: RadladsConfig, layer: int, context_tokens: float) -> float:
    """FLOPs per token along time, forward: attention over `context_tokens` earlier tokens, or the recurrence."""
    D, N = config.num_attention_heads * config.head_dim, config.head_dim
    mixer = config.time_mixers[layer]
    return 4 * D * context_tokens if mixer == "qwen2" else _STATE_FLOPS[mixer] * D * N


def forward_flops(config: RadladsConfig, sequence_tokens: int) -> float:
    """FLOPs per token of the blocks, forward, averaged over a causal sequence; embedding, norms and head excluded."""
    total = 0.0
    for layer in range(config.num_hidden_layers):
        weights = mixer_weights(config, layer)
        channel_mixer = 3 * config.hidden_size * config.intermediate_size
        total += 2 * (weights.at_input + weights.inside + channel_mixer)
        total += mixing_flops(config, layer, sequence_tokens / 2)
    return total


def head_flops(config: RadladsConfig) -> float:
    """FLOPs per token of the language-model head, forward."""
    return 2.0 * config.hidden_size * config.vocab_size


def train_flops(stage: str, student: RadladsConfig, teacher: RadladsConfig, sequence_tokens: int) -> float:
    """FLOPs per token of a training step, without recomputation and without the optimiser.

    align: the teacher's blocks forward (the last channel mixer too, though nothing needs its output), the student's
    mixers forward and backward but for the gradient of their input.
    distill: the teacher forward, the student forward and backward. extend: the student forward and backward.
    """
    whole_student = 3 * (forward_flops(student, sequence_tokens) + head_flops(student))
    if stage == "extend":
        return whole_student
    if stage == "distill":
        return forward_flops(teacher, sequence_tokens) + head_flops(teacher) + whole_student
    total = forward_flops(teacher, sequence_tokens)
    for layer in student.recurrent_layers:
        weights = mixer_weights(student, layer)
        total += 4 * weights.at_input + 6 * weights.inside + 3 * mixing_flops(student, layer, sequence_tokens / 2)
    return total
