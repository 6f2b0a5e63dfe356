"""How the next token is chosen from logits, for all rows at once and without waiting for the device.

Shape letters: B rows, V vocabulary or the part of it that is left, G groups of tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

GROUP_TOKENS = 128
# Above 0: logits divided by less overflow, and more is no different from drawing evenly
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6
TEMPERATURES = f"0 (greedy) or from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"
MAX_SEED = 2**63 - 1  # torch takes twice as much, which leaves room for rows


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. temperature 0 takes the likeliest; top_k 0 and top_p 1 leave all tokens in;
    seed None draws another text every time, and row n of a batch draws with seed + n (0 to MAX_SEED). max_tokens bounds
    the tokens generated. num_ids: ids from there on, the rows that pad an embedding, are never chosen; 0 = every row is
    a token's.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    seed: int | None = None
    num_ids: int = 0

    def __post_init__(self) -> None:
        if not is_temperature(self.temperature):
            raise ValueError(f"temperature must be {TEMPERATURES}, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0 or self.max_tokens < 1:
            raise ValueError("top_k must be 0 or more, and max_tokens 1 or more")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed must be from 0 to {MAX_SEED}, not {self.seed}")
        if self.num_ids < 0:
            raise ValueError(f"num_ids must be 0 (all rows of the embedding) or more, not {self.num_ids}")


def is_temperature(number: float) -> bool:
    """Whether logits can be divided by it, or it is 0, which stands for the likeliest token."""
    return number == 0 or MIN_TEMPERATURE <= number <= MAX_TEMPERATURE


def row_generators(sampling: Sampling, rows: int) -> list[torch.Generator]:
    """One generator for each row, on the CPU, so that a row's text depends neither on its batch nor on the device."""
    generators = [torch.Generator() for _ in range(rows)]
    for row, generator in enumerate(generators):
        generator.seed() if sampling.seed is None else generator.manual_seed(sampling.seed + row)
    return generators


def choose(logits_BV: torch.Tensor, sampling: Sampling, uniforms_B: torch.Tensor) -> torch.Tensor:
    """A token id for each row, [B], after temperature, top-k and top-p (the smallest set of that probability).

    uniforms_B: one draw from [0, 1) for each row decides; the same draw gives the same token.
    """
    if sampling.num_ids:
        logits_BV = logits_BV[:, : sampling.num_ids]
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.float() / sampling.temperature
    if sampling.top_k:
        logits_BV, ids_BV = logits_BV.topk(min(sampling.top_k, logits_BV.shape[-1]))
    elif sampling.top_p < 1:
        logits_BV, ids_BV = logits_BV.sort(descending=True)
    else:
        return draw(_weights(logits_BV), uniforms_B)
    weights_BV = _weights(logits_BV)
    if sampling.top_p < 1:
        below_BV = running_sums(weights_BV)
        wanted_B1 = sampling.top_p * below_BV[:, -1:]
        weights_BV = weights_BV.masked_fill(below_BV - weights_BV >= wanted_B1, 0.0)
    return ids_BV.gather(1, draw(weights_BV, uniforms_B)[:, None])[:, 0]


def draw(weights_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """The index [B] at which the running sum of weights (fp32, >= 0) first exceeds the draw's share of the whole."""
    sums_BV = running_sums(weights_BV)
    # Short of the whole by more than the sums' rounding, and never a token without weight
    wanted_B1 = uniforms_B[:, None] * sums_BV[:, -1:] * (1 - 1e-6)
    return ((sums_BV > wanted_B1) & (weights_BV > 0)).byte().argmax(-1)


def running_sums(weights_BV: torch.Tensor) -> torch.Tensor:
    """cumsum(-1) up to rounding, in two levels, since a GPU scans one long row slowly."""
    B, V = weights_BV.shape
    inner_BGT = F.pad(weights_BV, (0, -V % GROUP_TOKENS)).view(B, -1, GROUP_TOKENS).cumsum(-1)
    totals_BG = inner_BGT[..., -1]
    return (inner_BGT + (totals_BG.cumsum(-1) - totals_BG)[..., None]).view(B, -1)[:, :V]


def _weights(logits_BV: torch.Tensor) -> torch.Tensor:
    return (logits_BV - logits_BV.amax(-1, keepdim=True)).exp()
