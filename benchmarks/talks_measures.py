"""How a model talks, as benchmarks/talks.py measures it: its own replies, scored by its teacher and by programs."""

import copy
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from talks_prompts import Asked, asked
from torch.nn.utils.rnn import pad_sequence

from radlads.distill.losses import kl_divergence
from radlads.inference.chat_template import ChatTemplate
from radlads.inference.sampling import Sampling
from radlads.inference.writing.replies import Reply, fitting_rows, reply_sampling, write_replies
from radlads.model.modeling import RadladsForCausalLM

FIGURES = ("on_policy_kl", "on_policy_kl_reverse", "loops", "endless", "followed")
# A reply loops if its last tokens repeat themselves so often, with a period of so many at most
LOOP_TOKENS, LOOP_PERIOD = 48, 24
_SCORED_TOKENS = 8192
_EXAMPLES = 8


def talk(
    model: RadladsForCausalLM,
    teacher: RadladsForCausalLM,
    folder: Path,
    *,
    num_prompts: int,
    max_tokens: int,
    seed: int,
) -> dict[str, Any]:
    """FIGURES, the share followed of each kind of instruction, standard errors, and some replies.

    on_policy_kl: KL(teacher || model) in nats a token, on replies that the model draws at temperature 1, the tokens
    that end them included; on_policy_kl_reverse: KL(model || teacher) there. loops, endless, followed: shares of greedy
    replies that end in a loop, do not end within max_tokens, and do what was asked. folder: the tokenizer's.
    """
    template = ChatTemplate(folder, model.config.vocab_size)
    prompts = asked(num_prompts)
    speaker = _as_used(model)
    drawn = _replies(speaker, template, prompts, Sampling(temperature=1.0, max_tokens=max_tokens, seed=seed))
    greedy = _replies(speaker, template, prompts, Sampling(temperature=0, max_tokens=max_tokens, seed=seed))
    kl = _divergences(model, teacher, drawn, template.turn_end())
    texts = [template.tokenizer.decode(reply.tokens, skip_special_tokens=True) for reply in greedy]
    followed = [each.is_followed(text.strip()) for each, text in zip(prompts, texts, strict=True)]
    found = {
        "loops": [loops(reply.tokens) for reply in greedy],
        "endless": [not reply.has_ended for reply in greedy],
        "followed": followed,
    }
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for each, is_followed in zip(prompts, followed, strict=True):
        by_kind[each.kind].append(is_followed)
    shares = {name: _mean(values) for name, values in found.items()}
    return {
        **dict(zip(FIGURES[:2], kl, strict=True)),
        **shares,
        "stderr": {name: (share * (1 - share) / len(prompts)) ** 0.5 for name, share in shares.items()},
        "followed_by_kind": {kind: _mean(values) for kind, values in by_kind.items()},
        "mean_reply_tokens": _mean([len(reply.tokens) for reply in greedy]),
        "endless_drawn": _mean([not reply.has_ended for reply in drawn]),
        "examples": [[each.prompt, text] for each, text in zip(prompts[:_EXAMPLES], texts, strict=False)],
    }


def loops(tokens: Sequence[int]) -> bool:
    """Whether the last LOOP_TOKENS tokens repeat themselves with a period of LOOP_PERIOD or less."""
    last = list(tokens[-LOOP_TOKENS:])
    if len(last) < LOOP_TOKENS:
        return False
    return any(last[period:] == last[:-period] for period in range(1, LOOP_PERIOD + 1))


def _as_used(model: RadladsForCausalLM) -> RadladsForCausalLM:
    """A copy in the precision that one would use it in: bf16 on a GPU."""
    dtype = torch.bfloat16 if model.device.type == "cuda" else torch.float32
    return copy.deepcopy(model).to(dtype).eval().requires_grad_(False)  # type: ignore[arg-type]


def _replies(
    model: RadladsForCausalLM, template: ChatTemplate, prompts: Sequence[Asked], sampling: Sampling
) -> list[Reply]:
    ids = [template.token_ids([{"role": "user", "content": each.prompt}]) for each in prompts]
    replies = [Reply(number, prompt) for number, prompt in enumerate(ids)]
    rows = fitting_rows(model, max(map(len, ids)) + sampling.max_tokens)
    sampling = reply_sampling(sampling, template.vocab_size)
    for _ in write_replies(model, replies, sampling, template.stop_ids(), rows=rows):
        pass
    return replies


@torch.no_grad()
def _divergences(
    model: RadladsForCausalLM, teacher: RadladsForCausalLM, replies: Sequence[Reply], end: int
) -> tuple[float, float]:
    """KL(teacher || model) and KL(model || teacher), means over the tokens of replies."""
    device, totals, count = model.device, torch.zeros(2, dtype=torch.float64), 0
    ordered = sorted(replies, key=lambda reply: len(reply.prompt) + len(reply.tokens))
    while ordered:
        longest = len(ordered[-1].prompt) + len(ordered[-1].tokens) + 1
        num = max(1, _SCORED_TOKENS // longest)
        batch, ordered = ordered[-num:], ordered[:-num]
        texts = [torch.tensor([*each.prompt, *each.tokens, *([end] if each.has_ended else [])]) for each in batch]
        rows = pad_sequence(texts, batch_first=True).to(device)
        places = torch.arange(rows.shape[1] - 1)
        firsts = torch.tensor([[len(each.prompt) - 1] for each in batch])
        stops = torch.tensor([[len(text) - 1] for text in texts])
        counted = ((places >= firsts) & (places < stops)).to(device)
        hidden = [each.model(rows[:, :-1], use_cache=False).last_hidden_state[counted] for each in (model, teacher)]
        for start in range(0, len(hidden[0]), 512):
            own, taught = (
                F.linear(states[start : start + 512], each.lm_head.weight)
                for states, each in zip(hidden, (model, teacher), strict=True)
            )
            totals += torch.stack([kl_divergence(taught, own), kl_divergence(own, taught)]).double().cpu()
        count += int(counted.sum())
    forward, reverse = (totals / count).tolist()
    return forward, reverse


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
