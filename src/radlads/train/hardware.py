"""What the hardware at hand can do for a stage, and what to lower where it cannot."""

import torch

from radlads.config.schema import Config, TrainConfig, checkpointing_of, stage_of
from radlads.model.modeling import has_triton
from radlads.train.engines.engine import Engine

_OLDEST_BF16_CAPABILITY = (8, 0)


def check_hardware(train: TrainConfig) -> tuple[str, str]:
    """The accelerator and the precision that a stage runs with, "auto" resolved for the latter.

    Raises ValueError if the GPU asked for is missing, or too old for bf16.
    """
    accelerator = {"gpu": "cuda"}.get(train.accelerator, train.accelerator)
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.accelerator is 'gpu', but no CUDA GPU is here: set --train.accelerator cpu (or auto)")
    if train.cuda_graphs == "always" and not (accelerator in ("cuda", "auto") and torch.cuda.is_available()):
        raise ValueError("train.cuda_graphs is 'always', but the stage runs on no CUDA GPU: set auto or never")
    precision = resolve_precision(train.precision, accelerator)
    if precision.startswith("bf16") and accelerator != "cpu" and not gpu_multiplies_bf16():
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        raise ValueError(
            f"this GPU (compute capability {capability}) has no bf16 units, which train.precision {precision!r} needs: "
            "set --train.precision fp32, or take a GPU of compute capability 8.0 or newer"
        )
    return accelerator, precision


def compiles(train: TrainConfig, device: torch.device) -> bool:
    """Whether train.compile means to compile on `device`; "auto" is on CUDA where Triton runs."""
    return train.compile == "always" or (train.compile == "auto" and device.type == "cuda" and has_triton(device))


def only_device(train: TrainConfig) -> torch.device:
    """Where the models of a process that is alone are built: on the first GPU if the stage runs on it, else the CPU."""
    on_gpu = train.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.device("cuda", 0) if on_gpu else torch.device("cpu")


def models_out_of_memory(engine: Engine, device: torch.device) -> str:
    """What to set where a GPU's memory is too small for the models alone."""
    remedies = ", or ".join(engine.remedies_for_models())
    return f"the {stage_of(engine.train)} stage's models do not fit into the GPU's {_size(device)} GB: {remedies}"


def out_of_memory(config: Config, engine: Engine, device: torch.device, *, graphed: bool) -> str:
    """What to lower when a stage does not fit into the GPU's memory. graphed: whether its passes are a CUDA graph."""
    train, checkpointing = config.train, checkpointing_of(config.train)
    remedies = [f"train.micro_bsz (now {train.micro_bsz}, with train.accumulate_grad_batches to make up for it)"]
    remedies.append(f"model.ctx_len (now {config.model.ctx_len})")
    recompute = [] if stage_of(train) == "align" or checkpointing == "full" else ["train.activation_checkpointing full"]
    settings = [*recompute, *(["train.cuda_graphs never"] if graphed else []), *engine.remedies_for_steps(recompute)]
    advice = f"lower {' or '.join(remedies)}" + (f", or set {' or '.join(settings)}" if settings else "")
    return f"the {stage_of(train)} stage does not fit into the GPU's {_size(device)} GB: {advice}"


def _size(device: torch.device) -> str:
    """The GPU's memory in GB."""
    return f"{torch.cuda.get_device_properties(device).total_memory / 1e9:.0f}"


def resolve_precision(precision: str, accelerator: str) -> str:
    """ "auto" as "bf16" where the hardware multiplies bf16 natively (CUDA from 8.0, or a CPU with AMX), else "fp32"."""
    if precision != "auto":
        return precision
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    return "bf16" if (cpu_multiplies_bf16() if on_cpu else gpu_multiplies_bf16()) else "fp32"


def gpu_multiplies_bf16() -> bool:
    """Whether the CUDA GPU, if there is one, has matrix units for bf16 (Ampere and newer)."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= _OLDEST_BF16_CAPABILITY


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has matrix units for bf16; without them bf16 is slower than fp32."""
    return bool(torch.backends.cpu.get_cpu_capability() != "DEFAULT" and torch.cpu._is_amx_tile_supported())
