"""Configurations: schema, loader and the YAML files. Imports no torch, so that errors show at once."""

from configs.errors import UserError
from configs.jobs import LinearProbeConfig, ObjectDiscoveryConfig, RobustnessConfig, SudokuConfig
from configs.loader import AnyJob, dump, find, load
from configs.schema import PretrainConfig

__all__ = [
    "AnyJob",
    "LinearProbeConfig",
    "ObjectDiscoveryConfig",
    "PretrainConfig",
    "RobustnessConfig",
    "SudokuConfig",
    "UserError",
    "dump",
    "find",
    "load",
]
