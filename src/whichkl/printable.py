"""Printable text: control characters are shown as escapes, and characters that an encoding lacks are spelled out."""

from __future__ import annotations

import re

ENCODING_ERRORS = "whichkl.spelled"
"""Name under which `spell` is registered as a handler of encoding errors."""

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
