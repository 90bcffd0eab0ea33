"""YAML as this project reads and writes it.

PyYAML follows YAML 1.1, where 6e-4 is a string, `no` is false, 010 is eight and 1:30 is ninety. Here plain
scalars are YAML 1.2's: true/false, decimal integers (with _ allowed), floats with or without a point, null.
Loader and dumper share that table, so whatever is written reads back as itself. A key that appears twice is
an error.
"""

import re
from typing import Any

import yaml

_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
)


class DuplicateKeys(yaml.YAMLError):
    """Keys given twice in one mapping; the message has one line for each."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars above, which refuses duplicate keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As SafeLoader's, noting every key that the mapping has already."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if key.value in lines:
                    first = lines[key.value]
                    self.duplicates.append(f"line {line}: {key.value!r} is given twice, first in line {first}")
                lines.setdefault(key.value, line)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what the loader above would read as something else."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def ignore_aliases(self, data: Any) -> bool:
        """Write values out each time: a person reads the file."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Control characters and Unicode's line ends are escaped: PyYAML loses some in its other styles."""
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
for _tag, _pattern, _first in _SCALARS:
    _compiled = re.compile(rf"^(?:{_pattern})$")
    _characters = [character if character != "\0" else "" for character in _first]
    _Loader.add_implicit_resolver(_tag, _compiled, _characters)
    _Dumper.add_implicit_resolver(_tag, _compiled, _characters)


def parse(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError."""
    loader = _Loader(text)
    try:
        value = loader.get_single_data()
        duplicates = list(dict.fromkeys(loader.duplicates))
    finally:
        loader.dispose()
    if duplicates:
        raise DuplicateKeys("\n".join(duplicates))
    return value


def dump(value: Any) -> str:
    """YAML text, in the order given, that `parse` reads back equal."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


def as_scalar(value: Any) -> str:
    """One value as it would stand in an override or behind a key."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=1 << 30, allow_unicode=True)
    return text.removesuffix("...\n").strip()
