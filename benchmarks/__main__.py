"""Run the CPU benchmarks and write ``benchmarks/results/<cpu>-<threads>t.{json,md}``."""

import json
import sys
import tempfile
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.common import RESULTS, slug
from fused_warmup.cli.bench.cases import Row
from fused_warmup.cli.bench.command import print_table, to_json, to_markdown

HERE = Path(__file__).resolve().parent


def run_benchmarks(arguments: list[str]) -> tuple[int, list[dict]]:
    """Run pytest-benchmark; return its exit code and the extra information of every benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        files = sorted(str(path) for path in HERE.glob("bench_*.py"))
        own = ["-q", "--benchmark-columns=median,iqr,rounds", f"--benchmark-json={report}"]
        code = int(pytest.main([*files, *own, *arguments]))
        if code:
            return code, []
        return 0, [entry["extra_info"] for entry in json.loads(report.read_text())["benchmarks"]]


def main(arguments: list[str]) -> int:
    """Run the benchmarks and write the report; with pytest arguments, such as ``-k``, print it only."""
    code, results = run_benchmarks(arguments)
    if code:
        return code
    rows, where = [Row(**result["row"]) for result in results], results[0]["machine"]
    print_table(Console(), rows, where)
    if arguments:
        # a selection must not replace the page with all rows
        return 0
    RESULTS.mkdir(exist_ok=True)
    for suffix, text in ((".json", to_json(rows, where)), (".md", to_markdown(rows, where))):
        path = RESULTS / f"{slug(where['cpu'])}-{where['threads']}t{suffix}"
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
