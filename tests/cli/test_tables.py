"""Tables of the commands: within 80 columns, nothing cut, in any encoding."""

import os

import pytest
from cli.commands import (
    EDGE,
    FEW,
    NORMS,
    SEARCH,
    WHERE,
    WIDE,
    changed,
    check_readable,
    invoke,
    printed,
    row,
    run,
    save,
)

from fused_warmup.cli import machine
from fused_warmup.cli.bench import command
from fused_warmup.cli.words import printable

pytestmark = pytest.mark.usefixtures("width")


@pytest.mark.parametrize("charset", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("columns", ["80", "20", ""])
def test_the_table_of_bench_is_readable(monkeypatch, charset, columns):
    monkeypatch.setenv("COLUMNS", columns)
    text = printed(charset, command.print_table, [WIDE, row()], WHERE)
    check_readable(text, charset)
    words = text.replace("|", " ").split()
    for cell in command.cells(WIDE)[2:]:
        for word in printable(cell, charset).split():
            assert word in words, word
    # names may be on several lines, but no word of them
    for word in f"{WIDE.name} {WIDE.peer}".split():
        assert word in words, word
    for heading in command.HEADINGS:
        assert printable(heading, charset) in text or heading == "compared with"


def test_ascii_replaces_the_characters_of_tables():
    assert printable("1.5× 1–2 ≥ µs …", "ascii") == "1.5x 1-2 >= us ..."
    assert printable("1.5× µs", "latin-1") == "1.5× µs"
    assert printable("größe \udcff", "ascii") == "gr\\xf6\\xdfe \\udcff"
    assert printable("größe \udcff", "utf-8") == "größe \\udcff"
    texts = [heading for heading in command.HEADINGS] + list(command.cells(WIDE))
    assert all("\\" not in printable(text, "ascii") for text in texts)


@pytest.mark.parametrize("charset", ["utf-8", "ascii"])
def test_every_command_prints_in_any_encoding(tmp_path, monkeypatch, charset):
    monkeypatch.setattr(command, "run_case", lambda case, seconds: row(name="größe"))
    folder = tmp_path / "größe"
    folder.mkdir()
    path = save(
        folder, changed(edge=EDGE, search=SEARCH, note="größe", machine={"cpu": "Größe", "threads": 1})
    )
    norms = folder / "norms.csv"
    norms.write_text("norm\n" + "".join(f"{norm}\n" for norm in NORMS))
    shown = "größe" if charset == "utf-8" else "gr\\xf6\\xdfe"
    for args, words in (
        (("report", path), [shown, shown.replace("g", "G"), "6.0", "3.00"]),
        (("refine", norms, "-o", folder / "s.json"), [shown, "closest polynomial"]),
        (("train", *FEW, "--out", folder), [shown, "optimizer stage, sum"]),
        (("doctor",), [*machine.versions().values(), "available"]),
        (("doctor", "--traffic"), ["clip + EMA", "44"]),
        (("bench", "--quick", "--filter", "host 300 tensors, 1 group, kept"), [shown]),
        (("refine", folder / "nöne", "-o", folder / "s.json"), []),
        (("report", folder / "nöne"), []),
        (("--help",), ["doctor"]),
        (("train", "--help"), ["--ema"]),
    ):
        result = invoke(*args, charset=charset)
        if "--help" not in args:
            check_readable(result.stdout, charset)
        result.output.encode(charset)
        assert all(word in result.output for word in words), result.output


def test_a_name_that_is_no_text_is_printed(tmp_path):
    norms = tmp_path / os.fsdecode(b"\xff.csv")
    norms.write_text("norm\n1\n2\n")
    result = invoke("refine", norms, "-o", tmp_path / os.fsdecode(b"\xfe.json"))
    assert result.exit_code == 0, result.output
    assert "\\udcfe.json" in result.output


def test_long_names_do_not_cut_numbers(tmp_path):
    names = {"ours": run(name="o" * 50, train_loss=1e30), "theirs": run(name="t" * 50, stage_seconds=1e300)}
    result = invoke("report", save(tmp_path, changed(**names, backend="b" * 100)))
    assert result.exit_code == 0, result.output
    for number in ("1.0000e+30", "1.000e+300", "5.00e+299"):
        assert number in result.output
    check_readable("\n".join(line for line in result.stdout.splitlines() if "bbb" not in line))


def test_markup_is_text(tmp_path):
    result = invoke("report", save(tmp_path, changed(note="[/red] [bold]x[/bold] :smile:", backend="[/]")))
    assert result.exit_code == 0, result.output
    assert "[/red] [bold]x[/bold] :smile:." in result.output
    assert "backend [/]" in result.output
