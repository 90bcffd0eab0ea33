"""docs/reference/config.md, written from the schema and the rules.

python -m megagpt2.config.document > docs/reference/config.md
"""

import types
import typing
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megagpt2.config import yaml_format
from megagpt2.config.passthrough import DEEPSPEED_ALLOWED, DEEPSPEED_OWNED
from megagpt2.config.rules import rules_table_markdown
from megagpt2.config.schema import Config, RampUp

_INTRODUCTION = """\
# Configuration reference

<!-- Written by `python -m megagpt2.config.document` from the schema and the rules; don't edit. -->

A run is one YAML file and any number of overrides, `section.field=value`, where the value is YAML too:

    python launch/pretrain.py --config configs/gpt2_117m.yaml batch.micro_batch=4 data.train=data/mine

Numbers may be written `6e-4` and `50_257`; `true` and `false` are the booleans, `null` is no value. Unknown keys,
keys given twice and values of another type are errors, all reported together. The configuration of a run is
written to `RUN/config.yaml` and reads back as itself.
"""

_RULES = """\
## Legal combinations

Before the first process group, a request is checked against the machine. A refusal says in one sentence what was
asked, why it can't be, and the nearest legal values, which have themselves passed every rule. Where several rules
refuse and no one change satisfies all, a sentence has the nearest values that end its own refusal. Everything else is
legal, among it heads that `tensor_parallel` does not divide, and `norm: post` with every layout.

"""

_DEEPSPEED = """\
## deepspeed

Further DeepSpeed options, passed through: those that are known to leave results exact. Left out, they are DeepSpeed's
own (`overlap_comm` is then true under `zero_stage: 3`, and with state on NVMe `sub_group_size` is 20000000).

"""

_OWNED = """
All others are refused; among them these, which fields of ours decide:

"""


def document() -> str:
    """The whole page."""
    parts = [_INTRODUCTION]
    for name, field in Config.model_fields.items():
        model = field.annotation
        if isinstance(model, type) and issubclass(model, BaseModel):
            parts.append(_section(name, model))
            if name == "batch":
                parts.append(_section("batch.ramp_up", RampUp))
    owned = "".join(
        f"| `{theirs}` | `{ours.replace(' and ', '` and `')}` |\n" for theirs, ours in DEEPSPEED_OWNED.items()
    )
    passed = "".join(
        f"| `{option}` | {kind} | `{yaml_format.as_scalar(_plain(kind.default))}` |\n"
        for option, kind in DEEPSPEED_ALLOWED.items()
    )
    tables = (
        f"| Option | Value | DeepSpeed's own |\n|---|---|---|\n{passed}",
        f"| DeepSpeed | Decided by |\n|---|---|\n{owned}",
    )
    parts.append(_DEEPSPEED + tables[0] + _OWNED + tables[1])
    parts.append(_RULES + rules_table_markdown())
    return "\n".join(parts)


def _section(name: str, model: type[BaseModel]) -> str:
    rows = "".join(
        f"| `{key}` | {_type(field)} | {_default(field)} | {_one_line(field.description)} |\n"
        for key, field in model.model_fields.items()
    )
    head = "| Field | Type | Default | Meaning |\n|---|---|---|---|\n"
    return f"## {name}\n\n{_one_line(model.__doc__)}\n\n{head}{rows}"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return f"`{yaml_format.as_scalar(_plain(field.get_default(call_default_factory=True)))}`"


def _plain(default: Any) -> Any:
    """As YAML has it."""
    if isinstance(default, tuple):
        return list(default)
    return str(default) if isinstance(default, PurePath) else default


def _type(field: FieldInfo) -> str:
    return _annotation(field.annotation, field.metadata)


def _annotation(annotation: Any, metadata: typing.Sequence[Any] = ()) -> str:
    """A type as a reader names it, with its bounds."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _annotation(arguments[0], arguments[1:])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_annotation(one) for one in arguments)
    if origin is tuple:
        return f"list of {_annotation(arguments[0])}"
    if annotation is RampUp:
        return "section"
    names = {int: "integer", float: "number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(annotation, "path") + _bounds(metadata)


def _bounds(metadata: typing.Sequence[Any]) -> str:
    """' > 0, < 1' out of pydantic's constraints."""
    flat = [inner for one in metadata for inner in (one.metadata if isinstance(one, FieldInfo) else [one])]
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [f"{sign} {getattr(one, name):g}" for one in flat for name, sign in signs.items() if hasattr(one, name)]
    return f" {', '.join(found)}" if found else ""


if __name__ == "__main__":
    print(document(), end="")
