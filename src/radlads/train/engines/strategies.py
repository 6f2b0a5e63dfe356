"""Lightning's strategies of the engines. Imported when a trainer is made, because Lightning takes seconds to import."""

import logging
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from radlads.train.engines.zero import Zero, engine_dtype
from radlads.train.engines.zero3 import Zero3
from radlads.train.lightning_internals import DeepSpeedOfModule


class ReplicatedStrategy(DDPStrategy):
    """Lightning's DDP without torch's wrapper around the model.

    The wrapper's reducer expects one backward pass over all parameters; a stage has one for every part of its loss, and
    the align stage's are a CUDA graph. Gradients are added up by the engine instead.
    """

    def configure_ddp(self) -> None:
        """Leave the model as it is."""


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2, for models that sharding.py has sharded before the trainer exists."""

    def __init__(self, num_processes: int):
        super().__init__(data_parallel_size=num_processes, tensor_parallel_size=1)


class ZeroStrategy(DeepSpeedOfModule):
    """Lightning's DeepSpeedStrategy for a StageModule, whose loss comes in parts and is a sum.

    Each part has its backward, so DeepSpeed is told that it is its caller who knows when a window ends. Gradients are
    added up over micro-batches and processes, in fp32 where stage 2 or 3 keeps them, and divided by the count in the
    step.
    """

    def __init__(self, engine: Zero):
        self._engine, train, stage = engine, engine.train, engine.stage
        numbers = train.ds_bucket_mb * 10**6
        super().__init__(
            logging_level=logging.ERROR,
            config={
                "train_micro_batch_size_per_gpu": train.micro_bsz,
                "managed_gradient_accumulation": False,
                "gradient_allreduce_op": "mean" if stage == 3 else "sum",  # stage 3 knows no other
                "communication_data_type": "fp32",
                "gradient_clipping": train.gradient_clip_val,
                "data_types": {"grad_accum_dtype": "fp32" if stage >= 2 else None},
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {
                    "stage": stage,
                    "reduce_bucket_size": numbers,
                    "allgather_bucket_size": numbers,
                    "overlap_comm": False,
                    "stage3_param_persistence_threshold": 0,
                },
            },
        )

    def init_deepspeed(self) -> None:
        """Make DeepSpeed's engine of a student in rows, which is whole from then on, as its teacher is."""
        assert isinstance(self.config, dict)
        dtype = engine_dtype(self.precision_plugin.precision)
        self._engine.spread_out(self.root_device, dtype, self.config)
        super().init_deepspeed()
        self._engine.attach(self.deepspeed_engine)

    def training_step(self, *args: Any, **kwargs: Any) -> None:
        """The module's own: engine.forward would follow one output through one backward pass."""
        module = self.lightning_module
        assert isinstance(module, LightningModule)
        with self.precision_plugin.train_step_context():
            module.training_step(*args, **kwargs)


class PartitionedStrategy(ZeroStrategy):
    """ZeroStrategy for stage 3."""

    _engine: Zero3

    def training_step(self, *args: Any, **kwargs: Any) -> None:
        """See ZeroStrategy."""
        super().training_step(*args, **kwargs)
        self._engine.end_teachers_turn()

    def on_train_end(self) -> None:
        """See Lightning's."""
        super().on_train_end()
        self._engine.let_go_of_teacher()

    def hooked(self, model: torch.nn.Module) -> torch.nn.Module:
        """See DeepSpeedOfModule. A module of the model's parameters that nothing calls."""
        return torch.nn.ParameterList(model.parameters())
