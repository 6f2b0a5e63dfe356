"""DeepSpeed's engine in CPU processes, which Lightning and the command refuse: for tests of what runs on GPUs."""

import importlib
import os

from fused_adam import FusedAdam
from lightning.pytorch.strategies import DDPStrategy

from radlads.train.engines import strategies, zero
from radlads.train.optimizers import optim


def allow_cpus() -> None:
    """Let stages of this process run on DeepSpeed without a GPU."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    zero.check_device = lambda train, device: None
    strategies.ZeroStrategy.setup_environment = DDPStrategy.setup_environment
    strategies.ZeroStrategy.setup_distributed = setup_distributed
    initialize = deepspeed.initialize

    def initialize_on_cpu(args, **kwargs):
        args.device_rank = -1  # a CPU has no index
        return initialize(args=args, **kwargs)

    deepspeed.initialize = initialize_on_cpu
    initialize_strategy = strategies.ZeroStrategy.__init__

    def in_several_groups(strategy, engine):
        initialize_strategy(strategy, engine)
        strategy.config["zero_optimization"]["sub_group_size"] = 4000  # of stage 3

    strategies.ZeroStrategy.__init__ = in_several_groups
    # Else it compiles an extension first, for most of a minute
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    optim._check_on_gpu = lambda groups, train: None
    deepspeed.ops.adam.FusedAdam = FusedAdam


def setup_distributed(strategy: strategies.ZeroStrategy) -> None:
    strategy.set_world_ranks()
    strategy._init_deepspeed_distributed()
