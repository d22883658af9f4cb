"""One spelling for every answer: LaTeX and Unicode notations become plain signs before anything is compared.

After `clean`, ``π ∞ ± ∪ ∅ ≤ ≥ ≠ ≈ ∈ ∠ °`` stand for the commands of that name, ``*`` and ``/`` for every sign of
multiplication and division, ``⟨ ⟩`` for the escaped braces of a set, ``$`` for money only; ``\\frac`` and ``\\sqrt``
stay.
"""

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_VULGAR = re.compile("[¼½¾⅐-⅞]")
_SIGNS = str.maketrans(
    {
        **dict.fromkeys("−–—‒‑﹣－", "-"),
        **dict.fromkeys("×·∙⋅✕∗", "*"),
        **dict.fromkeys("÷∕⁄", "/"),
        **dict.fromkeys("“”„", '"'),
        **dict.fromkeys("‘’", "'"),
        "⟨": "(",
        "⟩": ")",
        "。": ".",
        "、": ",",
        "⩽": "≤",
        "⩾": "≥",
        "≦": "≤",
        "≧": "≥",
        "º": "°",
        "˚": "°",
    }
)
_MONEY = "\ue000"
_COMMANDS = {
    **dict.fromkeys(("times", "cdot", "ast"), "*"),
    **dict.fromkeys(("le", "leq", "leqslant"), "≤"),
    **dict.fromkeys(("ge", "geq", "geqslant"), "≥"),
    **dict.fromkeys(("ne", "neq"), "≠"),
    **dict.fromkeys(("lt",), "<"),
    **dict.fromkeys(("gt",), ">"),
    **dict.fromkeys(("approx", "simeq", "thickapprox"), "≈"),
    **dict.fromkeys(("circ", "degree", "textdegree"), "°"),
    **dict.fromkeys(("emptyset", "varnothing"), "∅"),
    **dict.fromkeys(("langle",), "("),
    **dict.fromkeys(("rangle",), ")"),
    **dict.fromkeys(("lbrace",), "⟨"),
    **dict.fromkeys(("rbrace",), "⟩"),
    **dict.fromkeys(("left", "right", "big", "Big", "bigl", "bigr", "Bigl", "Bigr", "displaystyle", "textstyle"), ""),
    **dict.fromkeys(("quad", "qquad", "space", "limits"), " "),
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), "\\frac"),
    **dict.fromkeys(("colon",), ":"),
    **dict.fromkeys(("mid", "vert"), "|"),
    **{"div": "/", "pi": "π", "infty": "∞", "pm": "±", "cup": "∪", "in": "∈", "angle": "∠", "percent": "%"},
    **{"euro": "€", "pounds": "£", "Omega": "Ω", "mu": "µ", "to": "→", "rightarrow": "→", "triangle": "△"},
}
_COMMAND = re.compile(r"\\([A-Za-z]+)(?![A-Za-z])")
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|textnormal|mathrm|mathbf|mathit|mathsf|mathbb|operatorname|mbox|boldsymbol|"
    r"bm)\s*\{([^{}]*)\}"
)
_DEGREE = re.compile(r"\^\s*(?:\{\s*(°|\\circ|\\degree)\s*\}|(°|\\circ(?![A-Za-z])|\\degree(?![A-Za-z])))")
_THIN = re.compile(r"(?<=[0-9])(?:\\[,!]|\{,\}|[\u2009\u202f])(?=[0-9]{3}(?![0-9]))")
_SPACING = re.compile(r"\\[,;:! ]|~")
_DELIMITERS = re.compile(r"\\[()\[\]]")
_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
_MATHS_MODE = re.compile(r"\$\$?([^$]*)\$\$?")
_PLAIN = re.compile(r"[A-Za-z0-9 ,+\-]*")
_QUOTES = "\"'`*_"


def clean(text: str) -> str:
    """The text in the plain notation, without surrounding blanks, boxes, quotes and final stops. Linear."""
    text = " ".join(text.split())
    if _PLAIN.fullmatch(text):
        return text
    if not text.isascii():
        text = _unicode(text)
    text = _unwrap(text)
    if "\\" in text or "$" in text or "~" in text or "{,}" in text:
        text = _latex(text)
    text = text.replace("<=", "≤").replace(">=", "≥").replace("!=", "≠")
    return _unwrap(" ".join(text.split()))


def _unicode(text: str) -> str:
    """Compatibility forms and foreign digits as ASCII; superscripts as powers, ½ as a fraction of its own."""
    text = _SUPERSCRIPT.sub(lambda match: "^{" + match[0].translate(_SUPERSCRIPTS) + "}", text)
    text = _VULGAR.sub(lambda match: _vulgar(match[0]), text)
    text = text.translate(_SIGNS)
    text = _THIN.sub("", text)
    text = unicodedata.normalize("NFKC", text).translate(_SIGNS)
    if text.isascii():
        return text
    return "".join(str(unicodedata.decimal(c)) if c > "\x7f" and c.isdecimal() else c for c in text)


def _vulgar(sign: str) -> str:
    over, under = unicodedata.normalize("NFKC", sign).split("⁄")
    return f"\\frac{{{over}}}{{{under}}}"


def _latex(text: str) -> str:
    for _ in range(4):
        text, count = _TEXT.subn(r" \1", text)
        if not count:
            break
    text = text.replace("\\%", "%").replace("\\$", _MONEY).replace("\\&", "&")
    text = text.replace("\\{", "⟨").replace("\\}", "⟩").replace("\\\\", " ; ")
    text = _DEGREE.sub("°", text)
    text = _SPACING.sub(" ", _THIN.sub("", text))
    text = _DELIMITERS.sub("", text)
    text = _COMMAND.sub(lambda match: _COMMANDS.get(match[1], match[0]), text)
    text = text.replace("^{°}", "°").replace("^°", "°")
    if text.count("$") % 2 == 0:
        text = _MATHS_MODE.sub(r"\1", text)
    return text.replace(_MONEY, "$")


def _unwrap(text: str) -> str:
    """Without final stops, quotes, Markdown emphasis and boxes around the whole."""
    for _ in range(8):
        before = text
        text = text.strip().rstrip(".,;").strip()
        if len(text) > 1 and text[0] == text[-1] and text[0] in _QUOTES:
            text = text[1:-1]
        elif (box := _BOX.match(text)) and closing(text, box.end() - 1) == len(text) - 1:
            text = text[box.end() : -1]
        if text == before:
            break
    return text


def closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at ``start``, whichever of ``) ] } ⟩`` it is; -1 where none does."""
    depth = 0
    for index in range(start, len(text)):
        if text[index] in "([{⟨":
            depth += 1
        elif text[index] in ")]}⟩":
            depth -= 1
            if depth == 0:
                return index
    return -1


def split_outside(text: str, separator: re.Pattern[str]) -> list[str]:
    """The text cut at matches of ``separator`` that lie in no brackets."""
    depth, depths = 0, []
    for character in text:
        depth += (character in "([{⟨") - (character in ")]}⟩")
        depths.append(depth)
    parts, begin = [], 0
    for match in separator.finditer(text):
        if depths[match.start()] == 0 and match.start() >= begin:
            parts.append(text[begin : match.start()])
            begin = match.end()
    parts.append(text[begin:])
    return [part.strip() for part in parts]
