"""Every number of benchmarks/real_conversion.py, each an option of it."""

from dataclasses import dataclass

from conversion_runs import knob


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every number of a run."""

    align_tokens: int = knob(20_000_000, "Budget of stage 1")
    distill_tokens: int = knob(40_000_000, "Budget of stage 2")
    extend_tokens: int = knob(5_000_000, "Budget of stage 3")
    align_lr: float = knob(1e-3, "Rate of stage 1, the paper's; falls to 1 % of it")
    distill_lr: float = knob(3e-4, "Rate of stage 2; falls to 3 %. The paper's 1e-5 is for billions of parameters")
    extend_lr: float = knob(1e-5, "Rate of stage 3, the paper's; flat")
    context: int = knob(512, "Tokens in a sequence of stages 1 and 2, and in the windows of the headline figures")
    batch_tokens: int = knob(8192, "Tokens in a step of stages 1 and 2")
    long_context: int = knob(4096, "Tokens in a sequence of stage 3, and in the windows of the figures by position")
    long_batch_tokens: int = knob(16_384, "Tokens in a step of stage 3")
    measure_tokens: int = knob(262_144, "Held-out tokens of each kind for the headline figures")
    position_tokens: int = knob(262_144, "Held-out tokens of each kind for the figures by position")
    recall_samples: int = knob(20, "Prompts in each cell of the passkey's and the needle's grid")
    ruler_samples: int = knob(20, "Questions of each RULER task at each length")
    reply_tokens: int = knob(96, "Longest reply to a chat prompt")
    seed: int = knob(1337, "Seed of the first conversion; the second one's is the next number")

    @property
    def edges(self) -> tuple[int, ...]:
        """Bins of the figures by position: the short context, then doubling."""
        edges = [0, self.context]
        while edges[-1] < self.long_context:
            edges.append(min(2 * edges[-1], self.long_context))
        return tuple(edges)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of RULER's questions, which need 1024 tokens, and with half of that of the grids' prompts."""
        return tuple(length for length in (1024, 2048, 4096) if length <= self.long_context)


TINY = Plan(
    align_tokens=2048,
    distill_tokens=2048,
    extend_tokens=2048,
    context=128,
    batch_tokens=256,
    long_context=1024,
    long_batch_tokens=1024,
    measure_tokens=1024,
    position_tokens=2048,
    recall_samples=2,
    ruler_samples=1,
    reply_tokens=8,
)
