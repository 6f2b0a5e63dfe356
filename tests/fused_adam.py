"""A stand-in for DeepSpeed's fused Adam, which is a CUDA extension."""

import torch


class FusedAdam(torch.optim.Optimizer):
    """What DeepSpeed's does, which is a CUDA extension: its arguments, its state, its quirks."""

    def __init__(self, params, lr, *, betas, eps, adam_w_mode, weight_decay=0.0):
        assert adam_w_mode
        super().__init__(
            params, {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def zero_grad(self):
        super().zero_grad()

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group.setdefault("step", 0)
            present = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in present:
                if not self.state[parameter]:
                    moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                    self.state[parameter].update(moments, step=group["step"])
            if present:  # the last one's alone counts
                self.state[present[-1]]["step"] += 1
            for parameter in present:
                self._update(parameter, group, self.state[present[-1]]["step"])

    def _update(self, parameter, group, step):
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        gradient = parameter.grad
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        spread = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt().add_(group["eps"])
        parameter.addcdiv_(state["exp_avg"], spread, value=-group["lr"] / (1 - beta1**step))
