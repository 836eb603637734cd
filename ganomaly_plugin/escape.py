"""Text from records, configs and file names, made safe for where it is shown: names are data, wherever they come from."""

from __future__ import annotations

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
    "×": r"$\times$",
    "±": r"$\pm$",
}
#: What a spreadsheet takes for the start of a formula; the wide forms are those of East Asian input methods.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
#: For `str.translate`: control characters, which no page needs, as `?`; line ends and tabs stay.
WITHOUT_CONTROL = {code: "?" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\r\t"}


def printable(text: str) -> str:
    """`text` for a terminal: control characters, escape sequences and marks that turn its direction become `?`."""
    return text if text.isprintable() else "".join(char if char.isprintable() else "?" for char in text)


def latex_escape(text: str) -> str:
    """`text` as LaTeX prints it, with any character that pdflatex's default set-up lacks replaced by `?`."""
    return "".join(_LATEX.get(char, char if char.isascii() and char.isprintable() else "?") for char in text)


def markdown_escape(text: str) -> str:
    """`text` safe inside a Markdown table cell."""
    plain = "".join(char if char.isprintable() else "?" for char in text)
    for char in "\\|*_<>`[]":
        plain = plain.replace(char, f"\\{char}")
    return plain


def spreadsheet_safe(value: object) -> object:
    """Text that a spreadsheet would take for a formula gets a leading apostrophe; numbers stay numbers."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
