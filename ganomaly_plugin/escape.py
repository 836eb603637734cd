"""Text from records, configs and file names, made safe for where it is shown: names are data, wherever they come from."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "×": r"$\times$",
    "±": r"$\pm$",
}
_LATEX |= {"ß": r"{\ss}", "æ": r"{\ae}", "Æ": r"{\AE}", "œ": r"{\oe}", "Œ": r"{\OE}"}
_LATEX |= {"ø": r"{\o}", "Ø": r"{\O}", "ł": r"{\l}", "Ł": r"{\L}"}
#: Combining accents: grave, acute, circumflex, tilde, macron, breve, dot, diaeresis, ring, double acute, caron, cedilla.
_ACCENTS = dict(zip("\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u030a\u030b\u030c\u0327", "`'^~=u.\"rHvc", strict=True))
#: What a spreadsheet takes for the start of a formula; the wide forms are those of East Asian input methods.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
#: For `str.translate`: control characters, which no page needs, as `?`; line ends and tabs stay.
WITHOUT_CONTROL = {code: "?" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\r\t"}


def printable(text: str) -> str:
    """`text` for a terminal: control characters, escape sequences and marks that turn its direction become `?`."""
    return text if text.isprintable() else "".join(char if char.isprintable() else "?" for char in text)


def clip(text: str, most: int = 34) -> str:
    """`text`, its middle left out when it is long."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[len(text) - most // 2 :]}"


def storable(text: str) -> str:
    """`text` for a record: what is no text of UTF-8, as in some file names, becomes escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def latex_escape(text: str) -> str:
    """`text` as LaTeX prints it in its default set-up, which has Latin letters and their accents; others by number: U+88C2."""
    return "".join(map(_latex_char, unicodedata.normalize("NFC", text)))


def _latex_char(char: str) -> str:
    if char in _LATEX or not char.isprintable():
        return _LATEX.get(char, "?")
    if char.isascii():
        return char
    parts = unicodedata.normalize("NFD", char)
    if len(parts) == 2 and parts[0].isascii() and parts[1] in _ACCENTS:
        return rf"\{_ACCENTS[parts[1]]}{{{parts[0]}}}"
    return f"U+{ord(char):04X}"


def markdown_escape(text: str) -> str:
    """`text` safe inside a Markdown table cell."""
    plain = printable(text)
    for char in "\\|*_<>&`[]":
        plain = plain.replace(char, f"\\{char}")
    return plain


def markdown_row(cells: Iterable[str]) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def spreadsheet_safe(value: object) -> object:
    """Text that a spreadsheet would take for a formula gets a leading apostrophe; numbers stay numbers."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
