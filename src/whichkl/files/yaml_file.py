"""YAML file: a mapping of names to plain values, read within bounds, with the line of every value.

The file comes from outside: its size, its depth and the length of its texts are bounded, and values can't refer to each other, so
that reading takes at most seconds, and no more memory than the values themselves.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from whichkl._checks import InputError, WhichklError, cannot

_MAX_BYTES = 1_000_000
"""Size of the largest file that is read."""
_MAX_VALUES = 50_000
"""Largest number of names, values, lists and mappings, for which PyYAML takes a second."""
_MAX_DEPTH = 100
"""Largest number of lists and mappings inside each other."""
_MAX_TEXT = 10_000
"""Largest number of characters of a value: a mixture of a hundred components needs half of them."""
_MAX_NAME = 100
"""Largest number of characters of a name, or of a number."""
_PREFIX = "tag:yaml.org,2002:"
_NUMBERS = (f"{_PREFIX}int", f"{_PREFIX}float")
_PLAIN = (*_NUMBERS, f"{_PREFIX}bool", f"{_PREFIX}null")
"""Types of unquoted values other than text. A date is text."""


class YamlFile:
    """The values of a YAML file by name, and the line of each value."""

    def __init__(self, path: Path, values: dict[str, Any], root: Any) -> None:
        """Hold the values, and the nodes that they were made from."""
        self.path, self.values, self._root = path, values, root

    def line_of(self, place: tuple[Any, ...]) -> int:
        """Return the line of the value at a place, or of the nearest value."""
        node, line = self._root, 1
        for step in place:
            if isinstance(node, yaml.MappingNode):
                pair = next((pair for pair in node.value if pair[0].value == step), None)
                if pair is None:
                    continue  # a step that pydantic added, or a missing name
                line, node = pair[0].start_mark.line + 1, pair[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
                line = node.start_mark.line + 1
        return line

    @contextmanager
    def naming(self, *place: Any) -> Iterator[None]:
        """Put the line of a place before the message of an error in the block."""
        try:
            yield
        except WhichklError as error:
            raise type(error)(f"{self.path}, line {self.line_of(place)}: {error}") from error


def read_yaml(path: Path, example: str) -> YamlFile:
    """Read a file that holds one mapping of texts to values, lists and mappings.

    Args:
        path: the file.
        example: a possible first line of such a file, for messages.

    Raises:
        InputError: the file can't be read, is larger than 1 MB or has more than 50,000 values, isn't UTF-8 or YAML, isn't a
            mapping, gives a name twice, has a name that isn't text, an anchor, an alias or a tag, or is nested more than a
            hundred times. The message names the line.
    """
    text = _text_of(path)
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise _Fault(0, "it isn't a mapping of names to values", f"Begin with, say, `{example}`")
        return YamlFile(path, loader.construct_document(root), root)
    except _Fault as fault:
        raise InputError(cannot(f"read `{path}`", f"line {fault.line + 1}: {fault.because}", fault.instead)) from fault
    except yaml.YAMLError as error:
        raise InputError(cannot(f"read `{path}`", _said(error, text), "Look there, and at the line before")) from error


class _Fault(Exception):
    """YAML that this library doesn't accept."""

    def __init__(self, line: int, because: str, instead: str) -> None:
        super().__init__(because)
        self.line, self.because, self.instead = line, because, instead


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Composes plain values, and refuses anything else before it is built."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [one for one in pairs if one[0] in _PLAIN] for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    # PyYAML reads 1e-3 as text, since YAML 1.1 asks for a point
    for _first in "-+0123456789":
        yaml_implicit_resolvers.setdefault(_first, []).insert(
            0, (f"{_PREFIX}float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"))
        )

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Check an event, compose its node, and check the node."""
        event = self.peek_event()
        line = event.start_mark.line
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            because = f"`{event.anchor}` is an anchor or an alias, and values can't refer to each other"
            raise _Fault(line, because, "Write the value out")
        if event.tag is not None:
            raise _Fault(line, f"it isn't YAML of plain values: it has the tag `{event.tag}`", "Leave the tag out")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > _MAX_TEXT:
            because = f"a value has {len(event.value):,} characters, and {_MAX_TEXT:,} are the most"
            raise _Fault(line, because, "Shorten it")
        self._values += 1
        if self._values > _MAX_VALUES:
            because = f"it has more than {_MAX_VALUES:,} names and values"
            raise _Fault(line, because, "Put data into a file of samples, and many files into a folder")
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _Fault(line, f"it is nested more than {_MAX_DEPTH} times", "Correct the brackets, or the indentation")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.MappingNode):
            _check_names(node)
        elif node.tag in _NUMBERS and len(node.value) > _MAX_NAME:
            raise _Fault(line, f"a number has {len(node.value):,} characters", "Shorten it, or quote it if it's text")
        return node


def _check_names(node: Any) -> None:
    """Refuse a name that appears twice in a mapping, isn't text, or is too long."""
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line
        if not isinstance(key, yaml.ScalarNode) or key.tag != f"{_PREFIX}str":
            shown = f"the name `{key.value}`" if isinstance(key, yaml.ScalarNode) else "a name"
            raise _Fault(line, f"{shown} isn't text", "Write a word, or quote it")
        if len(key.value) > _MAX_NAME:
            raise _Fault(line, f"a name has {len(key.value):,} characters", "Shorten it")
        if key.value in seen:
            raise _Fault(line, f"`{key.value}` is repeated, after line {seen[key.value] + 1}", "Keep one of them")
        seen[key.value] = line


def _text_of(path: Path) -> str:
    """Read a regular file of UTF-8 text of bounded size."""
    do, data = f"read `{path}`", b""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):  # to open a pipe could wait for ever
            with path.open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        because = getattr(error, "strerror", None) or str(error)
        because = "there is no such file" if isinstance(error, FileNotFoundError) else because
        raise InputError(cannot(do, because, "Correct the path")) from error
    if not stat.S_ISREG(mode):
        because = "it is a folder" if stat.S_ISDIR(mode) else "it isn't a regular file"
        raise InputError(cannot(do, because, "Name the YAML file"))
    if len(data) > _MAX_BYTES:
        because = f"it is larger than {_MAX_BYTES:,} bytes"
        raise InputError(cannot(do, because, "Name the YAML file; a list of data is another file"))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(cannot(do, f"line {line}: it isn't UTF-8 text", "Save it as UTF-8")) from error


def _said(error: Any, text: str) -> str:
    """Return the line and the problem that PyYAML's parser (with a mark) or its reader (with a position) reports."""
    mark = getattr(error, "problem_mark", None)
    line = text.count("\n", 0, getattr(error, "position", 0)) if mark is None else mark.line
    said = [getattr(error, name, None) for name in ("context", "problem", "reason")]
    problem = ", ".join(str(one) for one in said if one) or str(error)
    return f"line {line + 1}: it isn't YAML ({problem[:200]})"
