"""Printable text: control characters as escapes, characters that an encoding lacks spelled out, results in short and as HTML."""

from __future__ import annotations

import dataclasses
import importlib
import re
import textwrap
from typing import Any

ENCODING_ERRORS = "whichkl.spelled"
"""Name under which `spell` is registered as a handler of encoding errors."""

_WORD = re.compile(r"(a|[a-z]{2,})(?=[\s,'’-]|$)")
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 and C1 controls except newline and tab, marks that change the direction of text, and lone surrogates."""

_SPELLINGS = {
    **{"‖": "||", "…": "...", "−": "-", "–": "-", "—": "-", "·": "-", "±": "+-", "×": "x", "→": "->", "←": "<-", "↦": "->"},
    **{"≤": "<=", "≥": ">=", "≈": "~", "≠": "!=", "∞": "inf", "√": "sqrt", "∇": "grad ", "∂": "d", "∫": "integral ", "∈": "in"},
    **{"∝": "~", "½": "1/2", "⅔": "2/3", "ℝ": "R", "ℓ": "l", "′": "'", "∏": "prod ", "∘": "o", "⊙": "*", "§": "section "},
    **{"\u0302": "-hat", "\u0303": "-tilde", "\u0304": "-bar", "Ẑ": "Z-hat", "ẑ": "z-hat", "ḡ": "g-bar", "ȳ": "y-bar"},
    **{"α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "η": "eta", "θ": "theta", "λ": "lambda"},
    **{"μ": "mu", "ν": "nu", "π": "pi", "ρ": "rho", "σ": "sigma", "τ": "tau", "φ": "phi", "χ": "chi", "ψ": "psi"},
    **{"Δ": "Delta", "Λ": "Lambda", "Π": "Pi", "Σ": "Sigma"},
    **{"‘": "'", "’": "'", "“": '"', "”": '"', "•": "-", "✓": "v", "✔": "v", "\u00a0": " ", "é": "e", "ö": "o", "ü": "u"},
}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ᵀᵃᵇᵈᵏˡˣ", "0123456789-Tabdklx")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₋ᵢⱼₖₘₓₜ", "0123456789-ijkmxt")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻ᵀᵃᵇᵈᵏˡˣ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₋ᵢⱼₖₘₓₜ]+")


WIDTH = 110
"""Largest number of characters of a line of wrapped text."""
_MAX_BRIEF = 300
_MAX_BRIEF_VALUE = 60


class HTML:
    """A result that notebooks show as HTML; what writes the HTML is imported at the first use."""

    def _repr_html_(self) -> str:
        html: str = importlib.import_module("whichkl.reporting.notebook").html_of(self)
        return html


def brief(one: Any) -> str:
    """Return a dataclass as `Name(field=value, …)` of at most 300 characters, without fields that hold their default.

    Tensors show their shapes, and long lists their lengths.

    >>> @dataclasses.dataclass
    ... class Found:
    ...     name: str
    ...     values: tuple = ()
    ...     reason: str | None = None
    >>> brief(Found("a", tuple(range(9))))
    "Found(name='a', values=<9 items>)"
    """
    shown = [(field, getattr(one, field.name)) for field in dataclasses.fields(one) if field.repr]
    parts = [f"{field.name}={_brief_value(value)}" for field, value in shown if value is not field.default and value != ()]
    while sum(map(len, parts)) + 2 * len(parts) > _MAX_BRIEF - len(type(one).__name__) - 4:
        parts = [*parts[: -2 if parts[-1] == "…" else -1], "…"]
    return f"{type(one).__name__}({', '.join(parts)})"


def _brief_value(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"<tensor {tuple(value.shape)}>"
    if isinstance(value, (list, tuple, dict, set, frozenset)) and len(value) > 3:
        return f"<{len(value)} items>"
    return shorten(f"{value:.6g}" if isinstance(value, float) else repr(value), _MAX_BRIEF_VALUE)


def count_of(n: int, noun: str) -> str:
    """Return a number of things, whose plural ends in s.

    >>> count_of(1, "row"), count_of(5_000, "row")
    ('1 row', '5,000 rows')
    """
    return f"{n:,} {noun}{'s' * (n != 1)}"


def shorten(text: str, most: int) -> str:
    """Cut a text to at most this many characters.

    >>> shorten("abcdef", 4)
    'abc…'
    """
    return text if len(text) <= most else f"{text[: most - 1]}…"


def wrapped(text: str, indent: str = "") -> list[str]:
    """Return a sentence as lines of at most 110 characters, each line after the first indented by two more.

    >>> wrapped("one two " * 20, "  ")[1].startswith("    ")
    True
    """
    how: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  ", **how) or [indent]


def as_sentence(text: str) -> str:
    """Return a text with a full stop, and its first letter as a capital, unless it begins with a symbol such as p or q(y|x).

    >>> as_sentence("the density is unnormalised"), as_sentence("p is unnormalised")
    ('The density is unnormalised.', 'p is unnormalised.')
    """
    first = text[:1].upper() if _WORD.match(text) else text[:1]
    return f"{first}{text[1:].removesuffix('.')}."


def printable(text: str) -> str:
    r"""Show control characters, direction marks and lone surrogates as escapes; newlines and tabs stay.

    >>> printable("a\x1b[2J\u202eb\nc")
    'a\\x1b[2J\\u202eb\nc'
    """
    return _UNSAFE.sub(_escaped, text)


def one_line(text: str) -> str:
    r"""Show newlines and tabs as escapes too.

    >>> one_line("a\nb\tc\r")
    'a\\nb\\tc\\x0d'
    """
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def spelled(text: str, encoding: str) -> str:
    r"""Return the text with each character that the encoding lacks spelled out.

    >>> spelled("KL(p‖q) = 0.1 ± 0.2, k̂ below 0.7, 10⁻⁵ …", "ascii")
    'KL(p||q) = 0.1 +- 0.2, k-hat below 0.7, 10^-5 ...'
    >>> spelled("KL(p‖q) ± 日", "cp1252")
    'KL(p||q) ± \\u65e5'
    """
    done, start = [], 0
    while True:
        try:
            text[start:].encode(encoding)
        except UnicodeEncodeError as error:
            done += [text[start : start + error.start], spell(error)[0]]
            start += error.end
        else:
            return "".join([*done, text[start:]])


def spell(error: UnicodeError) -> tuple[str, int]:
    """Spell out the characters that couldn't be encoded: a handler for `codecs.register_error`.

    Raises:
        UnicodeError: the error isn't one of encoding.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    text = _RAISED.sub(lambda found: "^" + found[0].translate(_SUPERSCRIPTS), text)
    text = _LOWERED.sub(lambda found: "_" + found[0].translate(_SUBSCRIPTS), text)
    return "".join(character if character < "\x80" else _spelling(character) for character in text), error.end


def _spelling(character: str) -> str:
    if character in _SPELLINGS:
        return _SPELLINGS[character]
    if "\u2500" <= character <= "\u257f":  # lines of boxes and of progress bars
        return "-"
    if "\u2800" <= character <= "\u28ff":  # the dots of a spinner
        return "*"
    return character.encode("ascii", "backslashreplace").decode()


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
