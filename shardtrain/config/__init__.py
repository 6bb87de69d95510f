"""The config: YAML and overrides in; one typed, frozen, checked `RunConfig` out, or all problems at once."""

from shardtrain.config.compare import changes, check_same_run, differences
from shardtrain.config.errors import ConfigError, Problem
from shardtrain.config.frozen import thaw
from shardtrain.config.load import check_devices, load_config, parse_config
from shardtrain.config.schema import RunConfig
from shardtrain.config.strict_yaml import dump

__all__ = [
    "ConfigError",
    "Problem",
    "RunConfig",
    "changes",
    "check_devices",
    "check_same_run",
    "differences",
    "dump",
    "load_config",
    "parse_config",
    "thaw",
]
