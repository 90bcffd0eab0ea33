"""From a YAML file and dotted overrides to one frozen `Config`, and back.

    load_config("configs/gpt2_117m.yaml", ["batch.micro_batch=4", "optimizer.learning_rate=3e-4"])

All problems of a request are collected and reported together, each with its full dotted key.
"""

import difflib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from megagpt2.config import yaml_format
from megagpt2.config.errors import ConfigError
from megagpt2.config.schema import Config, RampUp

_KINDS = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text (quote it if it looks like a number)",
    "path_type": "a path (quote it if it looks like a number)",
    "tuple_type": "a list",
    "dict_type": "a section (key: value lines)",
    "model_type": "a section (key: value lines)",
    "finite_number": "a finite number",
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `field.path=value` overrides (values are YAML; the last wins), validate.

    Raises ConfigError with every problem found, one per line.
    """
    values = _read(Path(path))
    for section, field in Config.model_fields.items():
        if section in values and values[section] is None and _is_section(field.annotation):
            values[section] = {}  # a section whose lines are all commented out
    problems = [problem for text in overrides if (problem := _apply(values, text))]
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        problems += [_describe(one) for one in error.errors()]
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError("\n".join([f"{path}: {count}", *(f"  {problem}" for problem in problems)]))
    return config


def valid_keys() -> Iterator[str]:
    """Every dotted key that a file or an override may set, sections included."""

    def below(model: type[BaseModel], prefix: str) -> Iterator[str]:
        for name, field in model.model_fields.items():
            yield prefix + name
            if _is_section(field.annotation):
                yield from below(field.annotation, f"{prefix}{name}.")

    yield from below(Config, "")
    yield from (f"batch.ramp_up.{name}" for name in RampUp.model_fields)


def dump_config(config: Config) -> str:
    """YAML with every field, defaults included, that `load_config` reads back as an equal Config."""
    return yaml_format.dump(_plain(config.model_dump()))


def save_config(config: Config, path: str | Path) -> None:
    """Write `dump_config` atomically."""
    write_atomically(Path(path), dump_config(config))


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fchmod(file.fileno(), 0o644)  # mkstemp's 0600 would hide the run from the rest of the group
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read(path: Path) -> dict[str, Any]:
    """The file as a mapping, or ConfigError naming file and line."""
    try:
        values = yaml_format.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{_nearest_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from error
    except yaml_format.DuplicateKeys as error:
        raise ConfigError("\n".join(f"{path}, {line}" for line in str(error).splitlines())) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_line(error)}: not valid YAML: {_cause(error)}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise ConfigError(f"{path}: the file must hold sections (model:, batch:, ...), not one {kind}")
    return values


def _apply(values: dict[str, Any], text: str) -> str | None:
    """Put one override into the values; the sentence that says why not, or None."""
    key, separator, value_text = text.partition("=")
    key = key.strip()
    if not separator or not all(key.split(".")):
        return f"override {text!r} is not of the form field.path=value"
    try:
        value = yaml_format.parse(value_text)
    except yaml.YAMLError as error:
        return f"override {text!r}: the value is not valid YAML: {_cause(error)}"
    *sections, last = key.split(".")
    place = values
    for depth, section in enumerate(sections):
        if place.get(section) is None:
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            return f"override {text!r}: {'.'.join(sections[: depth + 1])} is a value, it has no fields"
    place[last] = value
    return None


def _describe(error: Any) -> str:
    """One pydantic error as one line: dotted key, value, what is allowed."""
    key = ".".join(str(part) for part in error["loc"])
    kind, value = error["type"], error.get("input")
    if kind == "extra_forbidden":
        return f"{key}: unknown key{_nearest_key(key)}"
    if kind == "missing":
        return f"{key}: required, but not given{_meaning(error['loc'])}"
    if kind == "value_error" and isinstance(value, dict):  # a whole section was judged
        return f"{key}: {error['ctx']['error']}"
    if kind == "literal_error":
        allowed = f"allowed: {error['ctx']['expected'].replace(chr(39), '')}"
    elif kind == "value_error":
        allowed = str(error["ctx"]["error"])
    elif kind in _KINDS:
        allowed = f"must be {_KINDS[kind]}"
    else:
        allowed = error["msg"].replace("Input should be", "must be")
    return f"{key}: {value!r} is not legal: {allowed}"


def _nearest_key(key: str) -> str:
    """'; did you mean ...?' judged by the whole dotted key, and by its last part in any section."""
    keys = list(valid_keys())
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    if not close:
        by_last = {name.rpartition(".")[2]: name for name in reversed(keys)}
        found = difflib.get_close_matches(key.rpartition(".")[2], by_last, n=1, cutoff=0.6)
        close = [by_last[name] for name in found]
    if not close:
        close = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)
    return f"; did you mean {close[0]}?" if close else ""


def _nearest_file(path: Path) -> str:
    """Name a file that stands where the missing one was looked for."""
    try:
        names = [name.name for name in path.parent.iterdir() if name.suffix in (".yaml", ".yml")]
    except OSError:
        return f" ({path.parent} is not a directory)"
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _meaning(location: tuple[int | str, ...]) -> str:
    """What a missing field would say, in brackets."""
    model: Any = Config
    for part in location[:-1]:
        model = RampUp if part == "ramp_up" else model.model_fields[part].annotation
    field = model.model_fields[location[-1]]
    if _is_section(field.annotation):
        required = [name for name, inner in field.annotation.model_fields.items() if inner.is_required()]
        return f" (a section with {', '.join(required)})"
    return f" ({' '.join((field.description or '').split())})"


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}" if mark else ""


def _cause(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or " ".join(str(error).split())


def _plain(value: Any) -> Any:
    """Only what YAML has: tuples become lists, paths text."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, PurePath) else value
