"""Read CSV files of experiment trackers and spreadsheets; refuse those that can be read in two ways."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ... import _checks as check

DELIMITERS = (",", ";", "\t", "|")
# delimiters with which a comma may be the decimal sign
_DECIMAL_COMMA = (";", "\t")
_LARGEST = 2**30
# byte order marks in the order of the tests: that of UTF-16 is a prefix of that of UTF-32
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_STATED = re.compile(r"sep=([,;\t|])\r?\n")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_WITH_POINT = re.compile(r"[+-]?\d*\.\d+([eE][+-]?\d+)?")
_WITH_COMMA = re.compile(r"[+-]?\d*,\d+([eE][+-]?\d+)?")
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")


@dataclass(frozen=True)
class CsvTable:
    """A CSV file with a header line.

    Attributes:
        owner: Name of the caller, for error messages.
        path: The file.
        delimiter: Character between the fields.
        header: Names of the columns.
        header_line: Line number of the header, from 1.
        rows: Line number of the end of each row, and its fields, as many as in the header.
    """

    owner: str
    path: Path
    delimiter: str
    header: list[str]
    header_line: int
    rows: list[tuple[int, list[str]]]

    def numbers(self, name: str, hint: str = "") -> list[float]:
        """Return a column as numbers.

        Args:
            name: Name of the column.
            hint: Advice for the error message if there is no such column.

        Returns:
            One number per row.

        Raises:
            ValueError: If there is no such column or more than one, or a field is not a number or ambiguous.
        """
        if name not in self.header:
            self.fail(self.header_line, f"have the column {name!r}", self.header, hint)
        if self.header.count(name) > 1:
            self.fail(self.header_line, f"have the column {name!r} once", self.header)
        place, ambiguity = self.header.index(name), self._ambiguity()
        return [self._number(name, line, row[place], ambiguity) for line, row in self.rows]

    def _number(self, name: str, line: int, field: str, ambiguity: str) -> float:
        """Return a field as a number."""
        text = field.replace(",", ".") if self.delimiter in _DECIMAL_COMMA else field
        try:
            if not (ambiguity and "." in text):
                return float(text)
        except ValueError:
            ambiguity = ""
        self.fail(line, f"have a number in the column {name!r}", field, ambiguity)

    def _ambiguity(self) -> str:
        """Return why decimal signs and separators of thousands are ambiguous; empty if they are not."""
        fields = [field for _, row in self.rows for field in row] if self.delimiter in _DECIMAL_COMMA else []
        commas = [field for field in fields if _WITH_COMMA.fullmatch(field)]
        if commas and any(map(_WITH_POINT.fullmatch, fields)):
            return "The file has numbers with commas and numbers with points."
        # spreadsheets write semicolons in locales with a decimal comma
        if commas and self.delimiter != ";" and all(map(_THOUSANDS.fullmatch, commas)):
            return "The comma can be a decimal sign or separate thousands."
        return ""

    def fail(self, line: int, condition: str, got: Any, hint: str = "") -> NoReturn:
        """Raise ``ValueError`` for a line, with the delimiter in the hint."""
        hints = f"{hint} The delimiter found is {self.delimiter!r}."
        check.fail(self.owner, f"line {line} of {self.path}", condition, _brief(got), hints.lstrip())


def read_csv(owner: str, path: Path, wanted: Collection[str]) -> CsvTable:
    """Read a CSV file with a header line.

    Detects the encoding (UTF-8, UTF-16, UTF-32 or Latin-1) and the delimiter (one of ``DELIMITERS``). Empty
    lines are not rows.

    Args:
        owner: Name of the caller, for error messages.
        path: The file.
        wanted: Names of columns; they decide between two delimiters that both occur in the header.

    Returns:
        The table.

    Raises:
        ValueError: If the file is not a CSV file with a header line, or was cut short; names the line.
        OSError: If the file cannot be read.
    """
    text = _text(owner, path)
    with _fields_up_to(len(text)):
        delimiter = _delimiter(owner, path, text, wanted)
        rows = list(_rows(owner, path, text, delimiter))
    filled = [i for i, (_, row) in enumerate(rows) if any(row)]
    if not filled:
        check.fail(owner, str(path), "have a header line", "an empty file")
    (head, header), *below = rows[filled[0] : filled[-1] + 1]
    # in a single column an empty line may be a missing number
    below = [(line, row or [""]) for line, row in below if row or len(header) == 1]
    table = CsvTable(owner, path, delimiter, header, head, below)
    line, last = rows[-1]
    if any(last) and not text.endswith(("\n", "\r")):
        table.fail(line, "end with a line break", last, "The file was cut short.")
    for line, row in below:
        if len(row) != len(header):
            hint = "The file was cut short." if row is last and len(row) < len(header) else ""
            table.fail(line, f"have {len(header)} fields", len(row), hint)
    return table


def _text(owner: str, path: Path) -> str:
    """Return the text of a file, with its encoding detected."""
    with path.open("rb") as file:
        raw = file.read(_LARGEST + 1)
    if len(raw) > _LARGEST:
        check.fail(owner, str(path), f"have at most {_LARGEST} bytes", "more")
    encoding = next((name for mark, name in _MARKS if raw.startswith(mark)), "utf-8")
    # without a mark, a zero byte in the first letter indicates UTF-16
    if encoding == "utf-8" and b"\0" in raw[:2]:
        encoding = "utf-16-be" if raw.startswith(b"\0") else "utf-16-le"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        # any bytes are valid Latin-1, which encodes numbers as ASCII
        text = raw.decode("latin-1")
    found = _CONTROL.search(text)
    if found:
        line = text.count("\n", 0, found.start()) + 1
        check.fail(owner, f"line {line} of {path}", "be text", found.group())
    return text


def _delimiter(owner: str, path: Path, text: str, wanted: Collection[str]) -> str:
    """Return the delimiter of the header line, or a comma for a single column."""
    stated = _STATED.match(text)
    if stated:
        return stated.group(1)
    headers, line = {}, 1
    for delimiter in DELIMITERS:
        # a wrong delimiter inside quotes gives invalid CSV
        with suppress(ValueError):
            rows = _rows(owner, path, text, delimiter)
            line, headers[delimiter] = next((row for row in rows if any(row[1])), (1, []))
    found = [delimiter for delimiter, header in headers.items() if len(header) > 1]
    if len(found) > 1:
        found = [delimiter for delimiter in found if set(wanted) & set(headers[delimiter])] or found
    if len(found) > 1:
        names = _brief(headers[found[0]])
        check.fail(owner, f"line {line} of {path}", "have one delimiter", names, f"It can be one of {found}.")
    return found[0] if found else ","


def _rows(owner: str, path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the fields of each row."""
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        for fields in lines:
            # the line that states the delimiter for a spreadsheet is not a row
            if lines.line_num > 1 or not _STATED.match(text):
                yield lines.line_num, [field.strip() for field in fields]
    except csv.Error as error:
        hint = f"The delimiter found is {delimiter!r}."
        check.fail(owner, f"line {lines.line_num} of {path}", "be CSV", str(error), hint)


@contextmanager
def _fields_up_to(length: int) -> Iterator[None]:
    """Raise the field size limit of the module csv, which is global, to at least ``length``."""
    before = csv.field_size_limit()
    csv.field_size_limit(max(before, length))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _brief(value: Any) -> Any:
    """Return a value with long texts truncated, for an error message."""
    if isinstance(value, list):
        return [_brief(item) for item in value[:20]]
    return f"{value[:60]}..." if isinstance(value, str) and len(value) > 60 else value
