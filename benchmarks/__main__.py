"""Runs the benchmarks and writes ``benchmarks/results/<cpu>-<threads>t.{json,md}``."""

import json
import re
import sys
import tempfile
from pathlib import Path

import pytest
from rich.console import Console

from fused_warmup.cli.bench.cases import Row
from fused_warmup.cli.bench.command import print_table, to_json, to_markdown

HERE = Path(__file__).resolve().parent


def main(arguments: list[str]) -> int:
    """Run pytest-benchmark and report; with pytest arguments, such as ``-k``, without writing."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        files = sorted(str(path) for path in HERE.glob("bench_*.py"))
        own = ["-q", "--benchmark-columns=median,iqr,rounds", f"--benchmark-json={raw}"]
        code = pytest.main([*files, *own, *arguments])
        if code:
            return int(code)
        info = [entry["extra_info"] for entry in json.loads(raw.read_text())["benchmarks"]]
    rows, where = [Row(**entry["row"]) for entry in info], info[0]["machine"]
    print_table(Console(), rows, where)
    if arguments:
        # part of the rows must not replace the page that has them all
        return 0
    slug = re.sub(r"[^a-z0-9]+", "-", where["cpu"].lower()).strip("-")
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    for suffix, text in ((".json", to_json(rows, where)), (".md", to_markdown(rows, where))):
        path = results / f"{slug}-{where['threads']}t{suffix}"
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
