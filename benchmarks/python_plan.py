"""Every number of benchmarks/python_conversion.py, each an option of it."""

from dataclasses import dataclass

from conversion_runs import knob
from python_teacher import TeacherPlan


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every number of a run, chosen for 8.5 minutes on one H200 with 16 CPU cores."""

    vocab_size: int = knob(16384, "Entries of the tokenizer")
    tokenizer_bytes: int = knob(60_000_000, "Text that the tokenizer is trained on")
    hidden_size: int = knob(640, "Channels of the models")
    intermediate_size: int = knob(1760, "Channels inside the channel mixers")
    num_layers: int = knob(12, "Layers of the models")
    head_size: int = knob(64, "Channels of a head")
    teacher_seconds: float = knob(165.0, "Time for the teacher's training, compiling included")
    teacher_tokens: int = knob(0, "The teacher's token budget; 0 = by time")
    teacher_context: int = knob(2048, "Tokens in a sequence for the first 80 % of the teacher's training")
    teacher_batch_tokens: int = knob(131_072, "Tokens in a step of the teacher's")
    teacher_lr: float = knob(2e-3, "The teacher's learning rate (Muon, AdamW)")
    align_tokens: int = knob(2_000_000, "Budget of stage 1")
    distill_tokens: int = knob(3_000_000, "Budget of stage 2")
    extend_tokens: int = knob(1_000_000, "Budget of stage 3")
    align_lr: float = knob(1e-3, "Learning rate of stage 1, the paper's; falls to 1 % of it")
    distill_lr: float = knob(
        3e-4, "Learning rate of stage 2; falls to a tenth. The paper's 1e-5 is for models of billions of parameters"
    )
    extend_lr: float = knob(1e-4, "Learning rate of stage 3; falls to a tenth")
    context: int = knob(512, "Tokens in a sequence of stages 1 and 2")
    batch_tokens: int = knob(8192, "Tokens in a step of stages 1 and 2: small, because the steps are few")
    long_context: int = knob(
        8192, "Tokens in a sequence of stage 3, of the end of the teacher's training, and of the losses by position"
    )
    long_batch_tokens: int = knob(16_384, "Tokens in a step of stage 3")
    measure_tokens: int = knob(131_072, "Held-out tokens for loss, KL and agreement, in windows of --context")
    position_tokens: int = knob(262_144, "Held-out tokens for the losses by position")
    seed: int = knob(1337, "Seed of the teacher and of every student")

    def __post_init__(self) -> None:
        if self.long_context <= 4 * self.context:
            raise ValueError(f"--long-context must be more than 4 times --context, so above {4 * self.context}")

    @property
    def edges(self) -> tuple[int, ...]:
        """Bins of the losses by position: the short context, up to four times that, and all beyond."""
        return (0, self.context, 4 * self.context, self.long_context)

    def teacher(self, *, compile_layers: bool) -> TeacherPlan:
        """The teacher's part."""
        return TeacherPlan(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            head_size=self.head_size,
            context=self.teacher_context,
            long_context=self.long_context,
            long_share=0.2,
            batch_tokens=self.teacher_batch_tokens,
            seconds=self.teacher_seconds,
            tokens=self.teacher_tokens,
            lr=self.teacher_lr,
            seed=self.seed,
            compile=compile_layers,
        )


TINY = Plan(
    vocab_size=320,
    tokenizer_bytes=200_000,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    head_size=16,
    teacher_tokens=40_960,
    teacher_context=64,
    teacher_batch_tokens=1024,
    align_tokens=2048,
    distill_tokens=2048,
    extend_tokens=1024,
    context=32,
    batch_tokens=256,
    long_context=256,
    long_batch_tokens=256,
    measure_tokens=1024,
    position_tokens=1024,
)
