"""Configuration: every knob once (`schema`), and files and overrides to a checked `Config` (`load`)."""

from radlads.config.load import dump_config, load_config, parse_config
from radlads.config.schema import Config, ModelConfig, RopeConfig, Stage, TeacherConfig, TrainConfig, stage_of

__all__ = [
    "Config",
    "ModelConfig",
    "RopeConfig",
    "Stage",
    "TeacherConfig",
    "TrainConfig",
    "dump_config",
    "load_config",
    "parse_config",
    "stage_of",
]
