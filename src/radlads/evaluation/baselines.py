"""Models that a converted one has to beat: its teacher with a short window, itself before any training, and itself
without one of its parts."""

import copy
from dataclasses import replace
from typing import Literal

import torch

from radlads.convert.hf_source import TeacherSource
from radlads.convert.student import build_teacher
from radlads.convert.weight_map import transfer
from radlads.model.configuration import RadladsConfig
from radlads.model.contracts import SharedInputs
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.recurrent_mixer import RecurrentMixer
from radlads.model.softmax_attention import KeyValueState, SoftmaxAttention
from radlads.model.window import WindowSettings

WINDOW_TOKENS, SINK_TOKENS = 64, 4
WINDOW = WindowSettings(WINDOW_TOKENS, SINK_TOKENS)
_SEED = 1337


def setup_student(
    student: RadladsConfig, source: TeacherSource, dtype: torch.dtype = torch.float32
) -> RadladsForCausalLM:
    """A student of this configuration as setup leaves it: the teacher's weights copied, nothing trained."""
    config = copy.deepcopy(student)
    config.tie_word_embeddings = False
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        model = RadladsForCausalLM(config)
        transfer(source.weights, model, source.folder, tied=source.config.tie_word_embeddings)
    return model.to(dtype).eval()  # type: ignore[arg-type]


@torch.no_grad()
def without(model: RadladsForCausalLM, part: Literal["window", "recurrence"]) -> RadladsForCausalLM:
    """The model with layers that do without their window (docs/windows.md), or without their recurrence.

    The other part is as it was trained. The weights are the model's own, not copies. Raises ValueError if no layer has
    a window.
    """
    copied = _over_the_same_weights(model, but=("window_scale", "recurrent_scale"))
    windowed = [each for each in copied.modules() if isinstance(each, RecurrentMixer) and each.window is not None]
    if not windowed:
        raise ValueError(f"there is nothing to compare without its {part}: no layer of the model has a softmax window")
    for mixer in windowed:
        (mixer.window_scale if part == "window" else mixer.recurrent_scale).zero_()
    return copied


@torch.no_grad()
def without_kept_layers(model: RadladsForCausalLM, aligned: RadladsForCausalLM) -> RadladsForCausalLM:
    """A copy of the model that has `aligned`'s time mixer again wherever it keeps softmax and `aligned` does not.

    aligned: the student of align, from which the model was trained on. What only `aligned` has comes from there too.
    """
    pairs = zip(model.config.time_mixers, aligned.config.time_mixers, strict=True)
    changed = tuple(f"model.layers.{layer}.self_attn." for layer, (own, before) in enumerate(pairs) if own != before)
    copied, trained = copy.deepcopy(aligned), dict(model.named_parameters())
    for name, parameter in copied.named_parameters():
        if name in trained and not name.startswith(changed):
            parameter.copy_(trained[name])
    return copied


def windowed_teacher(source: TeacherSource, dtype: torch.dtype = torch.float32) -> RadladsForCausalLM:
    """The teacher whose layers see 64 tokens and 4 sinks."""
    teacher = build_teacher(source, dtype=dtype)
    limit_attention(teacher)
    return teacher


def narrowed(teacher: RadladsForCausalLM, window: WindowSettings = WINDOW) -> RadladsForCausalLM:
    """windowed_teacher of a model that is there already. The weights are the model's own, not copies."""
    model = _over_the_same_weights(teacher)
    limit_attention(model, window_tokens=window.window_tokens, sink_tokens=window.sink_tokens)
    return model


def _over_the_same_weights(model: RadladsForCausalLM, but: tuple[str, ...] = ()) -> RadladsForCausalLM:
    """Modules of their own with the same parameters and buffers, but copies of those with these last names."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return copy.deepcopy(model, {id(x): x for name, x in tensors if name.rpartition(".")[2] not in but})


def limit_attention(
    model: RadladsForCausalLM, *, window_tokens: int = WINDOW_TOKENS, sink_tokens: int = SINK_TOKENS
) -> None:
    """From now on let every softmax layer see the last `window_tokens` tokens, the present one included, and the
    first `sink_tokens` of a text. RoPE keeps the positions in the text."""

    def limit(module: torch.nn.Module, args: tuple) -> tuple:
        x, state, v_first, shared = args
        if shared.attention_mask is None and state is not None and x.shape[1] == 1:
            return x, _Recent(state, window_tokens, sink_tokens), v_first, shared
        return x, state, v_first, _narrow(shared, x, window_tokens, sink_tokens)

    for module in model.modules():
        if isinstance(module, SoftmaxAttention):
            module.register_forward_pre_hook(limit)


def _narrow(shared: SharedInputs, x: torch.Tensor, window_tokens: int, sink_tokens: int) -> SharedInputs:
    T = x.shape[1]
    mask = shared.attention_mask
    if mask is None:
        mask = torch.ones(1, 1, T, T, dtype=torch.bool, device=x.device).tril()
    # What the last query sees is all there is but padding: keys count from the first real one
    keys = mask[:, :, -1:].long().cumsum(-1) - 1
    queries = keys[..., -T:].transpose(-1, -2)
    seen = (queries - keys < window_tokens) | (keys < sink_tokens)
    return replace(shared, attention_mask=mask & seen)


class _Recent:
    """A softmax layer's state that stores all keys and values and shows one query the ones it may see."""

    def __init__(self, state: KeyValueState, window_tokens: int, sink_tokens: int):
        self._state, self._window_tokens, self._sink_tokens = state, window_tokens, sink_tokens

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._state.append(keys, values)
        return self._shown(keys), self._shown(values)

    def _shown(self, stored: torch.Tensor) -> torch.Tensor:
        recent = max(self._sink_tokens, stored.shape[2] - self._window_tokens)
        return torch.cat([stored[:, :, : self._sink_tokens], stored[:, :, recent:]], dim=2)
