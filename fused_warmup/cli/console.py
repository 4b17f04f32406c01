"""Console output in any encoding, without truncated numbers."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from .words import printable

_MIN_WIDTH = 80


class PlainConsole(Console):
    """A console that ignores markup, replaces unencodable characters and is at least 80 columns wide."""

    def __init__(self) -> None:
        super().__init__(markup=False, emoji=False, highlight=False)
        self.width = max(_MIN_WIDTH, self.width)

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a text with the characters that the encoding has."""
        return super().render_str(printable(text, self.encoding), **options)

    def write_line(self, text: str) -> None:
        """Print a line without wrapping it."""
        self.print(text, soft_wrap=True)
