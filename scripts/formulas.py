"""The texts of `scripts.panels` as HTML that needs no library and no mathematical font (`page.html` has the styles)."""

from __future__ import annotations

import re
from html import escape

COMMANDS = {"sum": '<span class="sum">∑</span>', "in": "∈"}


def to_html(text: str) -> str:
    """Return text with `code` and $formulas$ as HTML. Raises ValueError for LaTeX that is not known here."""
    html = ""
    for piece in re.split(r"(\$[^$]+\$|`[^`]+`)", text):
        if piece.startswith("$"):
            html += f'<span class="math" role="math" aria-label="{escape(piece[1:-1])}">{formula(piece[1:-1])}</span>'
        elif piece.startswith("`"):
            html += f"<code>{escape(piece[1:-1])}</code>"
        else:
            html += escape(piece, quote=False)
    return html


def formula(latex: str) -> str:
    r"""Return a formula of letters, numbers, signs, `_`, `^`, `\frac`, `\mathrm` and COMMANDS as HTML.

    Raises ValueError for any other command, and where a brace is missing.
    """
    tokens = re.findall(r"\\[A-Za-z]+|[A-Za-z]|[0-9.]+|\S", latex)
    html = _row(tokens)
    if tokens:
        raise ValueError(f"${latex}$: a }} too many")
    return html


def _row(tokens: list[str]) -> str:
    """Take tokens to the end of the formula, or up to the brace that ends the group."""
    html = ""
    while tokens and tokens[0] != "}":
        html += _atom(tokens)
    return html


def _atom(tokens: list[str]) -> str:
    """Take what one argument of a command is: a group, a command with its arguments, or a single token."""
    if not tokens:
        raise ValueError("a formula ends too soon")
    token = tokens.pop(0)
    if token == "{":
        html = _row(tokens)
        if not tokens:
            raise ValueError("a { without its }")
        tokens.pop(0)
        return html
    if token in ("_", "^"):
        tag = "sub" if token == "_" else "sup"
        return f"<{tag}>{_atom(tokens)}</{tag}>"
    if token == r"\frac":
        return f'<span class="frac"><span>{_atom(tokens)}</span><span>{_atom(tokens)}</span></span>'
    if token == r"\mathrm":
        return re.sub("</?i>", "", _atom(tokens))
    if token.startswith("\\"):
        if token[1:] not in COMMANDS:
            raise ValueError(f"{token} is not known to scripts/formulas.py: add it to COMMANDS")
        return COMMANDS[token[1:]]
    return f"<i>{token}</i>" if token.isalpha() else escape(token)
