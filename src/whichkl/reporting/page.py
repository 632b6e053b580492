"""Page: sections of text, tables and figures → one HTML file with everything inlined and nothing fetched, or Markdown."""

from __future__ import annotations

import html
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from whichkl._checks import plain, require
from whichkl.files.writing import is_report, write_whole
from whichkl.plots.style import Figure
from whichkl.printable import as_sentence, printable

_MAX_CONFIGURATION = 100_000
"""Most characters of a configuration that a page shows."""
_MAX_NUMBER_LENGTH = 24
"""A table's column with a longer cell holds sentences."""
_CODE = re.compile(r"`([^`\n]+)`")
_CODE_WITHOUT_MARKUP = re.compile(r"`([^`\n<>&|]+)`")
_MARKS = re.compile(r"([\\`*_\[\]|~])")


@dataclass(frozen=True)
class Block:
    """One piece of a section; make it with the class methods, which say what each kind holds."""

    kind: str
    text: str = ""
    figures: tuple[Figure, ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    label: str = ""

    @property
    def words(self) -> tuple[int, ...]:
        """The columns of a table that hold sentences rather than numbers: they are aligned left, and wrap."""
        cells = {i: [row[i] for row in self.rows] for i in range(1, len(self.columns))}
        return tuple(
            i
            for i, mine in cells.items()
            if any(len(one) > _MAX_NUMBER_LENGTH for one in mine) or not any(c.isdigit() for one in mine for c in one)
        )

    @classmethod
    def paragraph(cls, text: str) -> Block:
        """Plain text."""
        return cls("paragraph", text)

    @classmethod
    def sentence(cls, text: str) -> Block:
        """A note as a sentence, with its capital letter and full stop."""
        return cls.paragraph(as_sentence(text))

    @classmethod
    def finding(cls, text: str, label: str = "What it shows") -> Block:
        """The main conclusion, set apart."""
        return cls("finding", text, label=label)

    @classmethod
    def warning(cls, text: str, label: str) -> Block:
        """A finding against the result, set apart in another colour."""
        return cls("warning", text, label=label)

    @classmethod
    def chart(cls, figure: Figure, caption: str) -> Block:
        """A plotly figure with a caption."""
        return cls("chart", caption, figures=(figure,))

    @classmethod
    def charts(cls, figures: Sequence[Figure], caption: str) -> Block:
        """Small figures side by side under one caption; each has its heading in `layout.title`."""
        return cls("charts", caption, figures=tuple(figures))

    @classmethod
    def table(cls, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> Block:
        """A table of text; its first column names the rows."""
        return cls("table", caption, columns=tuple(columns), rows=tuple(tuple(row) for row in rows))

    @classmethod
    def listing(cls, text: str) -> Block:
        """Text whose lines stay as they are."""
        return cls("listing", text)


@dataclass(frozen=True)
class Section:
    """A heading, a sentence that introduces it, and blocks."""

    title: str
    lead: str
    blocks: tuple[Block, ...] = field(default=())
    tag: str = ""


class Page(NamedTuple):
    """Everything that a report shows."""

    title: str
    lead: str
    sections: Sequence[Section]
    footer: str


def configuration_section(
    fields: Mapping[str, Any], lead: str = "Everything that is needed to repeat this.", note: str = ""
) -> Section:
    """Return the section that shows the exact configuration as JSON, cut off where it's very long."""
    text = json.dumps(plain(fields), indent=1, ensure_ascii=False)
    if len(text) > _MAX_CONFIGURATION:
        text = text[:_MAX_CONFIGURATION] + f"\n… {len(text) - _MAX_CONFIGURATION:,} more characters; study.json has all."
    notes = (Block.paragraph(note),) if note else ()
    return Section("Exact configuration", lead, (*notes, Block.listing(text)))


def write_page(path: str | os.PathLike[str], title: str, lead: str, sections: Sequence[Section], footer: str = "") -> Path:
    """Write the page; an earlier report is replaced only when the new one is whole, and no other file is replaced.

    Args:
        path: where to; its folder is made.
        title: heading of the page.
        lead: one paragraph under it.
        sections: in order.
        footer: small print.

    Raises:
        InputError: jinja2 or plotly isn't installed, or there is a file of this name that isn't a report.
        ResourceError: the file can't be written.
    """
    jinja2 = require("jinja2", "app")
    here = files("whichkl.reporting")
    safe = require("markupsafe", "app").Markup
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if isinstance(value, str) and not isinstance(value, safe) else value,
    )
    numbered = [(section, [(block, _charts(block, safe)) for block in section.blocks]) for section in sections]
    text = environment.from_string((here / "page.html.j2").read_text()).render(
        title=title,
        lead=lead,
        sections=numbered,
        footer=footer,
        nonce=secrets.token_urlsafe(16),
        style=safe((here / "page.css").read_text()),
        plotly=safe(plotly_script()),
        table=lambda block: safe(html_table(block)),
        prose=lambda text: safe(html_prose(text)),
        script=safe((here / "page.js").read_text()),
    )
    write_whole(Path(path), text.encode(), is_own=is_report)
    return Path(path)


def _shown(value: Any) -> Any:
    """Return JSON in which control characters of every text, such as a column's name, are shown as escapes."""
    if isinstance(value, dict):
        return {key: _shown(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_shown(one) for one in value]
    return printable(value) if isinstance(value, str) else value


def _charts(block: Block, safe: Any) -> list[tuple[Any, str]]:
    """Return each figure as JSON, and its description for screen readers."""
    charts = []
    for figure in block.figures:
        title = html.unescape(figure.layout.title.text or "")
        charts.append((safe(chart_json(figure)), f"{title}. {block.text}" if title else block.text))
    return charts


def html_text(text: str) -> str:
    """Escape markup and control characters."""
    return html.escape(printable(text))


def html_prose(text: str) -> str:
    """Escape a sentence, and set what is between backticks as code.

    >>> html_prose("Try `fit.check()` if a < b.")
    'Try <code>fit.check()</code> if a &lt; b.'
    """
    return _CODE.sub(r"<code>\1</code>", html_text(text))


def html_table(block: Block) -> str:
    """Return a table as HTML, whose rows become cards on a narrow screen if columns hold sentences."""
    sentences = block.words

    def row(cells: Sequence[str], tag: str, scope: str) -> str:
        parts = []
        for i, cell in enumerate(cells):
            name, where = ("th", f' scope="{scope}"') if i == 0 or tag == "th" else (tag, "")
            words, label = ' class="words"' if i in sentences else "", html_text(block.columns[i])
            parts.append(f'<{name}{where}{words} data-label="{label}">{html_prose(cell)}</{name}>')
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(row(cells, "td", "row") for cells in block.rows)
    cards = ' class="cards"' if sentences and len(block.columns) > 2 else ""
    return f"<table{cards}><thead>{row(block.columns, 'th', 'col')}</thead><tbody>{body}</tbody></table>"


def plotly_script() -> str:
    """Return Plotly's script, which can stand in a page."""
    script: str = require("plotly.offline", "app").get_plotlyjs()
    return script.replace("</script", "<\\/script")


def chart_json(figure: Figure) -> str:
    """Return a figure as JSON that can't end the script in which it is."""
    text = json.dumps(_shown(json.loads(figure.to_json())), separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


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
    r"""Escape markup of Markdown and HTML, except code between backticks; a line stays one line.

    >>> _text("try `a_b` for a_b")
    'try `a_b` for a\\_b'
    """
    parts = _CODE_WITHOUT_MARKUP.split(" ".join(text.split()))
    plain_parts = [_MARKS.sub(r"\\\1", html.escape(one, quote=False)) for one in parts[::2]]
    codes = [f"`{one}`" for one in parts[1::2]]
    return "".join(one for pair in zip_longest(plain_parts, codes, fillvalue="") for one in pair)
