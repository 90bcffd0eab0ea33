"""The errors of a wrong request."""


class ConfigError(ValueError):
    """A configuration that can't be read or isn't valid. The message holds all problems, one per line."""
