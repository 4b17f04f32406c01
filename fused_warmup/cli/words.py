"""Formatting of texts and numbers for any output encoding; needs click only."""

from __future__ import annotations

import sys

import click

# ASCII for the other characters of the tables
_ASCII = str.maketrans({"×": "x", "–": "-", "≥": ">=", "µ": "u", "…": "..."})


def printable(text: str, encoding: str) -> str:
    """Replace the characters of a text that an encoding lacks."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(_printable_character(character, encoding) for character in text)
    return text


def _printable_character(character: str, encoding: str) -> str:
    """Return a character, or its ASCII form or escape sequence if the encoding lacks it."""
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return character.translate(_ASCII).encode(encoding, "backslashreplace").decode(encoding)
    return character


def fixed(x: float, digits: int) -> str:
    """Format a number with fixed decimals, or with an exponent from 1e7 on."""
    style = "f" if abs(x) < 1e7 else "e"
    return f"{x:.{digits}{style}}"


def print_error(text: str) -> None:
    """Print one line on stderr."""
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    one_line = text.replace("\n", " ")
    click.echo(printable(one_line, encoding), err=True)
