"""`radlads` with DeepSpeed's engine on CPU processes, which Lightning and the command refuse: for tests without GPUs.

Run with DS_ACCELERATOR=cpu.
"""

import sys

import deepspeed
from lightning.pytorch.strategies import DDPStrategy

from radlads import cli
from radlads.train import deepspeed_engine


def allow_cpus() -> None:
    deepspeed_engine.check_device = lambda train, device: None
    deepspeed_engine.Engine.setup_environment = DDPStrategy.setup_environment  # type: ignore[method-assign]
    deepspeed_engine.Engine.setup_distributed = _setup_distributed  # type: ignore[method-assign]
    initialize = deepspeed.initialize

    def initialize_on_cpu(args, **kwargs):
        args.device_rank = -1  # a CPU has no index
        return initialize(args=args, **kwargs)

    deepspeed.initialize = initialize_on_cpu


def _setup_distributed(strategy: deepspeed_engine.Engine) -> None:
    strategy.set_world_ranks()
    strategy._init_deepspeed_distributed()


if __name__ == "__main__":
    allow_cpus()
    sys.exit(cli.main())
