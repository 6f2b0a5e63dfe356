"""Arithmetic that a model's pass or a stage's step cannot do without, counted from the shapes. No tensor is touched.

C hidden size, D = H * N, H heads, N head size, F the channel mixer's size, V vocabulary. A product with a weight takes
2 FLOPs per weight and token; going back takes 2 for the weight's gradient and 2 for the input's.
"""

from radlads.model.configuration import RadladsConfig
from radlads.model.time_mixer import MixerWeights


def mixer_weights(config: RadladsConfig, layer: int) -> MixerWeights:
    """Matrices of a layer's time mixer, in weights."""
    return config.mixer_class(layer).product_weights(config, layer)


def mixing_flops(config: RadladsConfig, layer: int, context_tokens: float) -> float:
    """FLOPs per token along time, forward: attention over `context_tokens` earlier tokens, or the recurrence."""
    return config.mixer_class(layer).mixing_flops(config, layer, context_tokens)


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
