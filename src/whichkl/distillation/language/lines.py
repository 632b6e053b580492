"""Lines: what was read from a file, with the numbers of its lines, so that an error names the line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class Lines(list[Any]):
    """The lines of a file that aren't empty."""

    def __init__(self, values: Iterable[Any], path: str, numbers: Iterable[int]) -> None:
        super().__init__(values)
        self.path, self.numbers = path, tuple(numbers)


def place_of(data: Any, number: int, word: str = "example") -> str:
    """Return where an element of data is: the line of its file, or its number from 0 on.

    >>> place_of(["a"], 0), place_of(Lines(["a"], "a.jsonl", [2]), 0)
    ('example 0', 'line 2 of `a.jsonl`')
    """
    return f"line {data.numbers[number]} of `{data.path}`" if isinstance(data, Lines) else f"{word} {number}"
