"""A stage as a LightningModule: backward part by part, one optimiser step per accumulation window."""

from collections import defaultdict

import lightning as L
import torch

from radlads.config.schema import TrainConfig
from radlads.distill.stage import Stage, is_trainable
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.optim import build_optimizers, set_learning_rates


class StageModule(L.LightningModule):
    """Trains `student` by `stage`. The frozen teacher is kept out of the module tree and so of every checkpoint.

    Optimisation is manual, because a stage's loss comes in parts whose graphs are freed one by one, and because a
    loss is a sum over a count: gradients of sums are added up over the window and divided once by its whole count.
    """

    def __init__(
        self,
        stage: Stage,
        student: RadladsForCausalLM,
        teacher: RadladsForCausalLM | None,
        train: TrainConfig,
        num_steps: int,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.stage, self.student, self.settings, self.num_steps = stage, student, train, num_steps
        self._outside_the_tree = (teacher,)
        self.steps_done = self.tokens_done = 0
        self.last_metrics: dict[str, float] = {}
        self._sums: dict[str, torch.Tensor] = defaultdict(float)  # type: ignore[arg-type]
        self._counts: dict[str, int] = defaultdict(int)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(is_trainable(name, student, stage.trainable))

    @property
    def teacher(self) -> RadladsForCausalLM | None:
        """The frozen teacher, if the stage has one."""
        return self._outside_the_tree[0]

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return build_optimizers(self.student, self.settings)

    def training_step(self, tokens: torch.Tensor, batch_idx: int) -> None:
        """Add one micro-batch [B, T + 1] to the window; step at the window's end. ValueError for a non-finite loss."""
        for part in self.stage.parts(self.student, self.teacher, tokens):
            if not torch.isfinite(part.sum):
                raise ValueError(
                    f"the loss of {self.stage.name} ({part.name}) is {part.sum.item()} at step {self.steps_done + 1}: "
                    "lower the learning rate, or look for NaN in the weights the stage started from"
                )
            self.manual_backward(part.objective)
            self._sums[part.name] += part.sum
            self._counts[part.name] += part.count
        self.tokens_done += tokens[:, 1:].numel()
        if (batch_idx + 1) % self.settings.accumulate_grad_batches == 0:
            self._optimizer_step()

    def _optimizer_step(self) -> None:
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        parameters = list(self.student.parameters())
        total = sum(self._counts.values())
        torch._foreach_div_([p.grad for p in parameters if p.grad is not None], float(total))
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.settings.gradient_clip_val or float("inf"))
        if not torch.isfinite(norm):
            raise ValueError(
                f"the gradient of {self.stage.name} is {norm.item()} at step {self.steps_done + 1}: "
                "lower the learning rate, or start from an earlier checkpoint"
            )
        for optimizer in optimizers:
            set_learning_rates(optimizer.optimizer, self.settings, self.steps_done, self.num_steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self._record({f"lr_{group['role']}": group["lr"] for group in groups}, float(norm), total)

    def _record(self, rates: dict[str, float], norm: float, total: int) -> None:
        metrics = {
            "loss": float(sum(self._sums.values())) / total,
            "grad_norm": norm,
            "optimizer_step": float(self.steps_done),
            "tokens": float(self.tokens_done),
        }
        metrics |= rates
        if len(self._sums) > 1:
            metrics |= {name: float(self._sums[name]) / self._counts[name] for name in sorted(self._sums)}
        self.last_metrics = metrics
        self.log_dict(metrics, on_step=True, on_epoch=False)
        self._sums.clear()
        self._counts.clear()
