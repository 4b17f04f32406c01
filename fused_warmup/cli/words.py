"""Texts and numbers as a stream can show them; nothing here needs more than click."""

from __future__ import annotations

import sys

import click

# what the tables have beside ASCII
_ASCII = str.maketrans({"×": "x", "–": "-", "≥": ">=", "µ": "u", "…": "..."})


def printable(text: str, encoding: str) -> str:
    """Return a text in characters that an encoding has."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        if len(text) > 1:
            return "".join(printable(character, encoding) for character in text)
        return text.translate(_ASCII).encode(encoding, "backslashreplace").decode(encoding)
    return text


def fixed(x: float, digits: int) -> str:
    """Return a number with digits after the point, or with an exponent if it would be long."""
    return f"{x:.{digits}{'f' if abs(x) < 1e7 else 'e'}}"


def complain(text: str) -> None:
    """Print one line on stderr."""
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    click.echo(printable(" ".join(text.split("\n")), encoding), err=True)
