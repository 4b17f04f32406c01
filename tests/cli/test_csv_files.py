"""CSV files with norms: encodings, delimiters and decimal commas that are read, lines that are refused."""

import csv
import os
import re
import threading

import pytest
from cli.commands import NORMS, check_one_line, invoke, names

import fused_warmup as fw
from fused_warmup import schedules
from fused_warmup.tuning.refinement import norms as reading

pytestmark = pytest.mark.usefixtures("width")

PLAIN = "step,grad_norm\r\n" + "".join(f"{i},{norm}\r\n" for i, norm in enumerate(NORMS))
GERMAN = PLAIN.replace(",", ";").replace(".", ",")
LONG = PLAIN.replace("step,", "step,note,").replace("\r\n0,", "\r\n0," + "x" * 300_000 + ",")
LONG = "".join(line if line.count(",") == 2 else line.replace(",", ",y,") for line in LONG.splitlines(True))
READABLE = {
    "plain": PLAIN.encode(),
    "line feeds": PLAIN.replace("\r\n", "\n").encode(),
    "carriage returns": PLAIN.replace("\r\n", "\r").encode(),
    "doubled line ends": PLAIN.replace("\r\n", "\r\r\n").encode(),
    "mark of UTF-8": PLAIN.encode("utf-8-sig"),
    "mark of UTF-16": PLAIN.encode("utf-16"),
    "mark of UTF-16, big end first": b"\xfe\xff" + PLAIN.encode("utf-16-be"),
    "UTF-16 without a mark": PLAIN.encode("utf-16-le"),
    "UTF-16 without a mark, big end first": PLAIN.encode("utf-16-be"),
    "mark of UTF-32": PLAIN.encode("utf-32"),
    "Latin-1": PLAIN.replace("step", "größe,step").replace("\r\n", "\r\nä,").encode("latin-1")[:-2],
    "semicolons": PLAIN.replace(",", ";").encode(),
    "semicolons and decimal commas": GERMAN.encode(),
    "the same in UTF-16": GERMAN.encode("utf-16"),
    "tabulators": PLAIN.replace(",", "\t").encode(),
    "tabulators and decimal commas": GERMAN.replace(";", "\t").encode(),
    "bars": PLAIN.replace(",", "|").encode(),
    "a stated delimiter": ("sep=;\r\n" + GERMAN).encode(),
    "a blank last line": (PLAIN + "\r\n").encode(),
    "blank last lines": (PLAIN + "\r\n  \r\n,\r\n").encode(),
    "blank first lines": ("\r\n\r\n" + PLAIN).encode(),
    "quotes": re.sub(r"[^,\r\n]+", r'"\g<0>"', PLAIN).encode(),
    "blanks": PLAIN.replace(",", " , ").encode(),
    "a long field": LONG.encode(),
    "a delimiter in quotes": PLAIN.replace("step", '"a;b|c",step').replace("\r\n", '\r\n"1;2",')[:-6].encode(),
    "a line break in quotes": PLAIN.replace("step", '"a\r\nb",step').replace("\r\n", "\r\n1,")
    .replace("a\r\n1,", "a\r\n")[:-2].encode(),
}  # fmt: skip


@pytest.mark.parametrize("name", READABLE)
def test_unambiguous_files_are_read(tmp_path, name):
    path, limit = tmp_path / "norms.csv", csv.field_size_limit()
    path.write_bytes(READABLE[name])
    assert reading.read_norms("refine", path, "sgd").tolist() == NORMS
    assert csv.field_size_limit() == limit


# by content: the line, the delimiter that is named, and other words
UNCLEAR = {
    "step;grad_norm\n0;0,5\n1;0.5\n": (2, ";", "'0,5'", "commas and numbers with points"),
    "step;loss;grad_norm\n0;0,5;1.250\n1;0,6;1.5\n": (2, ";", "'1.250'", "commas and numbers with points"),
    "step\tgrad_norm\n0\t1,234\n1\t2,345\n": (2, "\\t", "'1,234'", "separate thousands"),
    "step;grad_norm\n0;1\n1;1,234,567\n": (3, ";", "'1,234,567'", "have a number"),
    "step;grad_norm\n0;1\n1;1.234,5\n": (3, ";", "'1.234,5'", "have a number"),
    'step,grad_norm\n0,1\n1,"1,5"\n': (3, ",", "'1,5'", "have a number"),
    "grad_norm\n0,5\n0,6\n": (2, ",", "have 1 fields, got 2"),
    "grad_norm\n1\n\n2\n": (3, ",", "got ''"),
    "step;grad_norm\n0;1\n1;2;3\n": (3, ";", "have 2 fields, got 3"),
    "step;grad_norm\n0;1\n1;\n": (3, ";", "got ''"),
    "step;grad_norm\n0;1\n1;2": (3, ";", "end with a line break", "cut short"),
    'step,grad_norm\n0,1\n1,"2\n': (3, ",", "be CSV"),
    "step,a;loss,b;c,d\n1,2;3,4;5,6\n": (1, None, "have one delimiter", "[',', ';']"),
    "1\n2\n3\n": (1, ",", "have the names of the columns", "['1']"),
    "step,grad_norm,grad_norm\n0,1,2\n1,2,3\n": (1, ",", "have the column 'grad_norm' once"),
    "\nloss,other\n1,2\n2,3\n": (2, ",", "have the column 'grad_norm'", "Name the one to take."),
    "step,grad_norm\n0,1\n1,\x07\n": (3, None, "be text", "'\\x07'"),
    "step,grad_norm\n0,1\n1," + "x" * 200_000 + "\n": (3, ",", "have a number", "xxx..."),
}


@pytest.mark.parametrize("text", UNCLEAR, ids=range(len(UNCLEAR)))
def test_ambiguous_files_are_named(tmp_path, text):
    path = tmp_path / "norms.csv"
    path.write_text(text)
    line, delimiter, *words = UNCLEAR[text]
    named = [f"The delimiter found is '{delimiter}'."] if delimiter else []
    result = invoke("refine", path, "-o", tmp_path / "s.json", "--kind", "sgd")
    check_one_line(result, f"refine: line {line} of {path} must", *named, *words)
    assert len(result.stderr) < 600
    assert names(tmp_path) == ["norms.csv"]


@pytest.mark.parametrize("content", [b"", b"\n\n", b" \n", b"\xef\xbb\xbf", b",,\n,,\n", b"\xff\xfe"])
def test_an_empty_file_has_no_header(tmp_path, content):
    path = tmp_path / "norms.csv"
    path.write_bytes(content)
    result = invoke("refine", path, "-o", tmp_path / "s.json")
    check_one_line(result, f"refine: {path} must have a header line, got 'an empty file'.")


def test_decimal_commas_reach_the_column_of_skipped_steps(tmp_path):
    path = tmp_path / "norms.csv"
    path.write_text("grad_norm;skipped\n0,5;0,0\n7,5;1,0\n1,25;0,0\n")
    assert reading.read_norms("refine", path, "sgd").tolist() == [0.5, 1.25]


def test_a_stream_is_read_once(tmp_path, norms_file):
    """An input that cannot be read twice, such as a pipe, gives schedule and chart."""
    pipe, out = tmp_path / "pipe", tmp_path / "s.json"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(norms_file.read_bytes()), daemon=True)
    writer.start()
    assert invoke("refine", pipe, "-o", out, "--plot", tmp_path / "p.png").exit_code == 0
    writer.join()
    assert schedules.from_json(out.read_text()) == fw.tuning.refinement(norms_file).schedule
