"""Markdown: the words and tables of a page as plain text, for a repository or a terminal."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from whichkl.reporting.page import Block, Section

_MARKS = re.compile(r"([\\`*_\[\]|~])")


def markdown(title: str, lead: str, sections: Sequence[Section], footer: str) -> str:
    """Write sections as Markdown, without figures; markup in names stays text.

    >>> markdown("a < b", "", [], "").splitlines()[0]
    '# a &lt; b'
    """
    parts = [f"# {_text(title)}", _text(lead)]
    for section in sections:
        parts += [f"## {_text(section.title)}", _text(section.lead)]
        parts += [text for text in map(_block, section.blocks) if text]
    return "\n\n".join([*parts, _text(footer)]) + "\n"


def _block(block: Block) -> str:
    if block.kind == "table":
        rows = [" | ".join(map(_text, row)) for row in (block.columns, *block.rows)]
        rows.insert(1, " | ".join(["---"] * len(block.columns)))
        text = "\n".join(f"| {row} |" for row in rows)
        return f"{text}\n\n{_text(block.text)}" if block.text else text
    if block.kind in ("finding", "warning"):
        return f"> **{_text(block.label)}.** {_text(block.text)}"
    if block.kind == "listing":
        return "\n".join(f"    {line}" for line in block.text.splitlines())
    return _text(block.text) if block.kind == "paragraph" else ""


def _text(text: str) -> str:
    """Escape markup of Markdown and HTML; a line stays one line."""
    return _MARKS.sub(r"\\\1", html.escape(" ".join(text.split()), quote=False))
