"""Every number of benchmarks/talks.py, each an option of it: those of real_plan.py, and stage 4's."""

from dataclasses import dataclass

import real_plan
from conversion_runs import Budget, knob


@dataclass(frozen=True, kw_only=True)
class Plan(real_plan.Plan):
    """Every number of a run."""

    prompts: int = knob(1_832, "Our own prompts that the teacher answers, to learn from")
    answers: int = knob(4, "Replies to each of them")
    reply_tokens: int = knob(256, "Longest reply, the teacher's and the student's own in training")
    instruct_tokens: int = knob(6_000_000, "Budget of stage 4, with and without rows of the student's own")
    instruct_lr: float = knob(1e-4, "Rate of stage 4; falls to a tenth")
    instruct_context: int = knob(512, "Tokens in a row of conversations")
    instruct_batch_tokens: int = knob(16_384, "Tokens in a step of stage 4")
    on_policy_share: float = knob(0.5, "Share of the rows that the student writes")
    on_policy_kl: str = knob("mixed", "What is learnt from them: forward, reverse or mixed")
    on_policy_every_steps: int = knob(8, "Steps for which the student writes at a time")
    measure_prompts: int = knob(300, "Prompts of the suite that each row answers")
    measure_reply_tokens: int = knob(256, "Longest reply that is measured")

    @property
    def instruct(self) -> Budget:
        """Stage 4's part of the plan."""
        return Budget(self.instruct_tokens, self.instruct_lr, self.instruct_context, self.instruct_batch_tokens)


TINY = Plan(
    align_tokens=2048,
    distill_tokens=2048,
    extend_tokens=1024,
    context=128,
    batch_tokens=256,
    long_context=256,
    long_batch_tokens=256,
    measure_tokens=512,
    prompts=12,
    answers=1,
    reply_tokens=24,
    instruct_tokens=1024,
    instruct_context=128,
    instruct_batch_tokens=256,
    on_policy_every_steps=2,
    measure_prompts=6,
    measure_reply_tokens=16,
)
