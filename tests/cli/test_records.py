"""Records for ``fused-warmup report``: bad ones, foreign files, encodings, telemetry of another run."""

import json
import math
import re

import pytest
from cli.commands import EDGE, SEARCH, TELEMETRY, changed, check_one_line, invoke, run, save, saved

pytestmark = pytest.mark.usefixtures("width")

BAD_RECORDS = {
    "zero times": (changed(ours=run(stage_seconds=0.0)), "ours.stage_seconds", "> 0", "got 0.0"),
    "no time per step": (changed(ours=run(stage_median=0)), "ours.stage_median", "> 0", "got 0"),
    "no time of the training": (changed(ours=run(step_seconds=0)), "ours.step_seconds", "> 0"),
    "a time before the start": (changed(theirs=run(stage_seconds=-1.0)), "theirs.stage_seconds", "> 0"),
    "strings for losses": (changed(ours=run(losses=["a", "b", "c"])), "ours.losses[0]", "a number or null"),
    "a string for a loss": (changed(ours=run(train_loss="1")), "ours.train_loss", "a number or null"),
    "a string for all losses": (changed(ours=run(losses="abc")), "ours.losses", "a list with entries"),
    "no losses": (changed(ours=run(losses=[])), "ours.losses", "a list with entries"),
    "fewer losses of torch": (changed(theirs=run(losses=[1.0])), "theirs.losses", "must have 3 entries"),
    "truth for a number": (changed(ours=run(losses=[True, 1, 1])), "ours.losses[0]", "got True"),
    "a number that no float holds": (changed(max_loss_difference=10**400), "max_loss_difference"),
    "infinity": (changed(ours=run(stage_seconds=math.inf)), "ours.stage_seconds", "got inf"),
    "no run": (changed(ours=None), "ours", "an object", "got None"),
    "lists for objects": (changed(settings=[]), "settings", "an object", "got []"),
    "a string for the steps": (changed(settings={**saved()["settings"], "steps": "3"}), "settings.steps"),
    "no steps": (changed(settings={**saved()["settings"], "steps": 0}), "settings.steps", ">= 1"),
    "no settings": (changed(settings={}), "be complete, got no settings.model"),
    "no machine": (changed(machine={}), "be complete, got no machine.cpu"),
    "no threads": (changed(machine={"cpu": "x", "threads": None}), "machine.threads"),
    "no accuracy": (changed(ours=run(validation={"loss": 1.0})), "got no ours.validation.accuracy"),
    "numbers for names": (changed(ours=run(name=1)), "ours.name", "a printable text"),
    "commands of a terminal": (changed(note="\x1b[2J"), "note", "a printable text"),
    "an empty edge": (changed(edge=[]), "edge", "a list with entries"),
    "an edge of nothing": (changed(edge=[{}]), "got no edge[0].step"),
    "strings at the edge": (changed(edge=[{**EDGE[0], "sharpness": "x"}]), "edge[0].sharpness"),
    "strings as a bound": (changed(edge=[{**EDGE[0], "sharpness_hi": "x"}]), "edge[0].sharpness_hi"),
    "flags of numbers": (changed(edge=[{**EDGE[0], "preconditioned_flags": [1]}]), "a list of printable"),
    "one flag": (changed(edge=[{**EDGE[0], "sharpness_flags": "rough"}]), "edge[0].sharpness_flags"),
    "an empty search": (changed(search={}), "got no search.rates"),
    "a search without a loss": (changed(search={**SEARCH, "losses": [1.0]}), "search.losses", "3 entries"),
    "mathematics that is none": (changed(ours=run(name="$\\frac$")), "numbers that can be drawn"),
    "no entries": ("{}", "must be of", "(None, None)"),
    "another version": (changed(version=2), "must be of", "2"),
    "an unhashable version": (changed(version=[]), "must be of"),
    "a list": ("[]", "must be of", "got []"),
    "a number": ("1", "must be of", "got 1"),
    "null": ("null", "must be of", "got None"),
    "nested brackets": ("[" * 100_000, "must be complete JSON"),
    "nested and closed brackets": ("[" * 100_000 + "]" * 100_000, "must be complete JSON"),
    "a few nested brackets": ("[" * 900 + "]" * 900, "must be of"),
    "nested objects": ('{"a":' * 100_000 + "1" + "}" * 100_000, "must be complete JSON"),
    "nested brackets of a record": (changed(ours="HERE").replace('"HERE"', "[" * 900 + "]" * 900), "ours"),
    "a cut": (changed()[:100], "must be complete JSON"),
    "an empty file": ("", "must be complete JSON"),
    "a digit too many": ("1" * 5000, "must be complete JSON"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_named(tmp_path, name):
    text, *words = BAD_RECORDS[name]
    path = save(tmp_path, text)
    result = invoke("report", path)
    check_one_line(result, path.with_suffix(""), *words)
    assert len(result.stderr) < 1000
    assert not path.with_suffix(".png").exists()
    # and it is named among others, which are shown
    save(tmp_path, name="good")
    both = invoke("report", tmp_path)
    assert str(path.with_suffix("")) in both.stderr
    assert "Traceback" not in both.output
    assert (tmp_path / "good.png").exists()
    foreign = any("must be of" in word or "JSON" in word for word in words)
    assert both.exit_code == (0 if foreign else 2)
    assert both.stderr.strip().endswith("It is passed over.") == foreign


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_records_are_read_in_any_encoding(tmp_path, encoding):
    path = save(tmp_path)
    path.write_text(json.dumps(saved(note="größe"), ensure_ascii=False), encoding=encoding)
    path.with_suffix(".csv").write_text(TELEMETRY, encoding=encoding)
    result = invoke("report", path)
    assert result.exit_code == 0, result.output
    assert "größe." in result.output


def test_optional_entries_may_be_missing(tmp_path):
    record = saved()
    for name in ("theirs", "edge", "search"):
        del record[name]
    result = invoke("report", save(tmp_path, json.dumps(record)))
    assert result.exit_code == 0, result.output
    assert "torch\n" not in result.output


def test_telemetry_that_does_not_belong_is_named(tmp_path):
    for table, words in (
        (TELEMETRY[: TELEMETRY.rindex("\n", 0, -1) + 1], ["must have 3 rows", "got 2"]),
        (TELEMETRY.replace("4.0", "x"), ["line 3 of", "'grad_norm'", "'x'"]),
        (TELEMETRY.replace("lr", "rate"), ["line 1 of", "'lr'"]),
        (TELEMETRY + "\x00", ["be text"]),
        ("", ["a header line"]),
    ):
        check_one_line(invoke("report", save(tmp_path, table=table)), tmp_path / "run.csv", *words)


def test_folders_hold_other_files(tmp_path):
    """A folder, a link to nothing and files of others are no records; those that are one are shown."""
    save(tmp_path)
    (tmp_path / "package.json").write_text('{"name": "x"}')
    (tmp_path / "tsconfig.json").write_text("// a comment\n{}")
    (tmp_path / "binary.json").write_bytes(bytes(range(256)))
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "nothing")
    result = invoke("report", tmp_path)
    assert result.exit_code == 0, result.output
    noted = result.stderr.splitlines()
    assert all(line.endswith("It is passed over.") for line in noted)
    assert [re.search(r"\w+\.json", line).group() for line in noted] == [
        "binary.json", "package.json", "tsconfig.json"
    ]  # fmt: skip
    assert (tmp_path / "run.png").exists()
    # named by itself, or alone, it is an error
    check_one_line(invoke("report", tmp_path / "package.json"), "package.json", "must be of")
    (tmp_path / "run.json").unlink()
    assert invoke("report", tmp_path).exit_code == 2
