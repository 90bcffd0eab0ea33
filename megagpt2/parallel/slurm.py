"""Slurm's own notations in the environment of a task, read without Slurm: lists of nodes and of counts."""

import re

_BRACKETS = re.compile(r"\[([^\[\]]*)\]")


def parse_nodelist(text: str) -> list[str]:
    """The host names in a Slurm node list, in its order: `node[01-03,7],gpu5-[1,2]` are six.

    Raises:
        ValueError: brackets or ranges that aren't Slurm's.
    """
    hosts = []
    for part in _split_outside_brackets(text):
        hosts += _expand(part, text)
    return hosts


def _split_outside_brackets(text: str) -> list[str]:
    parts, depth = [""], 0
    for character in text:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if depth not in (0, 1):
            break
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    if depth != 0 or not all(parts):
        raise ValueError(f"{text!r} is not a Slurm node list such as node[01-03,7],gpu1")
    return parts


def _expand(part: str, text: str) -> list[str]:
    brackets = _BRACKETS.search(part)
    if brackets is None:
        return [part]
    hosts = []
    for item in brackets.group(1).split(","):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if ends is None:
            raise ValueError(f"{item!r} in the Slurm node list {text!r} is neither a number nor a range")
        first, last = ends.group(1), ends.group(2) or ends.group(1)
        numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        if not numbers:
            raise ValueError(f"the range {item!r} in the Slurm node list {text!r} is empty")
        tails = _expand(part[brackets.end() :], text)
        hosts += [part[: brackets.start()] + number + tail for number in numbers for tail in tails]
    return hosts


def parse_counts(text: str) -> list[int]:
    """Tasks on each node: `4(x2),3` is [4, 4, 3].

    Raises:
        ValueError: anything else than such a list.
    """
    counts: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item.strip())
        if match is None:
            raise ValueError(f"{text!r} is not a Slurm list of counts such as 4(x2),3")
        counts += [int(match.group(1))] * int(match.group(2) or 1)
    return counts
