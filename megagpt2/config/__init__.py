"""Configuration: the schema, loading it, and the rules about legal combinations."""

from megagpt2.config.errors import ConfigError
from megagpt2.config.load import dump_config, load_config, save_config
from megagpt2.config.rules import Facts, IllegalRequest, Plan, check, legal_layouts
from megagpt2.config.schema import Config

__all__ = [
    "Config",
    "ConfigError",
    "Facts",
    "IllegalRequest",
    "Plan",
    "check",
    "dump_config",
    "legal_layouts",
    "load_config",
    "save_config",
]
