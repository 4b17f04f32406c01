"""How tables and lines are printed: as they are, in any encoding, and without a number cut."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from .words import printable

_NARROWEST = 80


class PlainConsole(Console):
    """A console that takes no text for markup, replaces what its encoding lacks, and has room for a table."""

    def __init__(self) -> None:
        super().__init__(markup=False, emoji=False, highlight=False)
        self.width = max(_NARROWEST, self.width)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return the text with what the encoding has."""
        return super().render_str(printable(text, self.encoding), **options)

    def write_line(self, text: str) -> None:
        """Print a line without breaking it."""
        self.print(text, soft_wrap=True)
