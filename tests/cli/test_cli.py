import csv
import json
import re
import runpy
import subprocess
import sys

import pytest
from cli.commands import FEW, check_one_line, invoke, train

import fused_warmup as fw
from fused_warmup import cli as package
from fused_warmup.cli import doctor, machine
from fused_warmup.cli.train import command as training
from fused_warmup.cli.train import config, data, loops, report
from fused_warmup.plan.structs import TELEMETRY

BASE = {
    **dict.fromkeys(("lr", "weight_decay", "batch_size")),
    "model": "gpt",
    "optimizer": "adamw",
    "schedule": "cosine",
    "steps": 12,
    "warmup": 2,
    "dtype": "float32",
    "param_rounding": "nearest",
    "state_dtype": "float32",
    "max_grad_norm": 1.0,
    "ema": 0.9,
    "seed": 0,
    "threads": 1,
    "backend": "auto",
    "out": "out",
    "sharpness_every": 0,
    "find_lr": False,
    "compare": True,
}


def record(out, model):
    return json.loads((out / f"{model}.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One short training per model, shared by the tests that only read."""
    out = tmp_path_factory.mktemp("out")
    return out, {model: train(out, "--model", model) for model in config.MODELS}


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


@pytest.mark.parametrize("model", config.MODELS)
def test_train_writes_chart_telemetry_and_record(trained, model):
    out, results = trained
    saved = record(out, model)
    assert png_size(out / f"{model}.png") == (720, 820)
    with (out / f"{model}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == TELEMETRY
    assert [float(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    # the rate after the warmup of 2 steps, and our losses
    assert float(rows[1]["lr"]) == pytest.approx(saved["settings"]["lr"])
    assert [float(row["loss"]) for row in rows] == pytest.approx(saved["ours"]["losses"])
    clip = [min(1.0, 1.0 / (float(row["grad_norm"]) + 1e-6)) for row in rows]
    assert [float(row["clip_coef"]) for row in rows] == pytest.approx(clip)
    assert saved["settings"]["steps"] == 6
    assert saved["machine"]["cpu"] == machine.cpu_model()
    assert saved["machine"]["threads"] == 1
    assert saved["versions"] == machine.versions()
    assert 0 < saved["ours"]["stage_seconds"] < saved["ours"]["step_seconds"]
    assert f"{saved['theirs']['validation']['loss']:.4f}" in results[model].output
    assert "torch" in results[model].output


@pytest.mark.parametrize("model", config.MODELS)
def test_both_runs_agree(trained, model):
    saved = record(trained[0], model)
    ours, theirs = saved["ours"], saved["theirs"]
    # same weights and batches, so the runs differ by the rounding of 6 steps only
    assert theirs["losses"] == pytest.approx(ours["losses"], abs=1e-4)
    assert theirs["averaged"]["loss"] == pytest.approx(ours["averaged"]["loss"], abs=1e-4)
    assert theirs["validation"]["loss"] == pytest.approx(ours["validation"]["loss"], abs=1e-4)
    # and the average is not the model
    assert abs(ours["averaged"]["loss"] - ours["validation"]["loss"]) > 1e-3
    pairs = zip(ours["losses"], theirs["losses"], strict=True)
    assert saved["max_loss_difference"] == max(abs(a - b) for a, b in pairs)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "giadam", "radam"])
def test_sharpness_and_line_search_are_drawn(tmp_path, optimizer):
    """The measurements do not change the training, bit for bit."""
    more = ("--sharpness", "--sharpness-every", 2, "--find-lr")
    common = ("--model", "digits", "--optimizer", optimizer, "--no-compare")
    result = train(tmp_path / "with", *common, *more)
    train(tmp_path / "without", *common)
    saved, plain = (record(tmp_path / name, "digits") for name in ("with", "without"))
    assert saved["ours"]["losses"] == plain["ours"]["losses"]
    assert saved["ours"]["validation"] == plain["ours"]["validation"]
    assert (plain["edge"], plain["search"]) == (None, None)
    assert [row["step"] for row in saved["edge"]] == [1, 3, 5]
    rate = saved["settings"]["lr"] / 2
    early = 2 * 1.9 / rate if optimizer == "sgd" else 2 * 1.9 / 0.1 / rate
    assert saved["edge"][0]["threshold"] == pytest.approx(early)
    for row in saved["edge"]:
        assert row["edge_ratio"] == pytest.approx(row["preconditioned"] / row["threshold"])
        for name in ("sharpness", "preconditioned"):
            assert row[f"{name}_lo"] <= row[name] < row[f"{name}_hi"]
            assert row["preconditioned_flags"] == (["cold"] if row["step"] == 1 else [])
        apart = (
            row["sharpness_hi"] < row["preconditioned_lo"] or row["preconditioned_hi"] < row["sharpness_lo"]
        )
        assert apart == (optimizer != "sgd")
    found = saved["search"]
    beyond = [loss > found["start"] for loss in found["losses"]]
    assert beyond == sorted(beyond)
    crossing = found["rates"][beyond.index(True) - 1 : beyond.index(True) + 1]
    assert crossing[0] * 0.9 < found["critical"] < crossing[1] * 1.1
    assert f"critical learning rate {found['critical']:.3g}" in " ".join(result.output.split())
    assert png_size(tmp_path / "with" / "digits-edge.png") == (720, 720)
    assert png_size(tmp_path / "with" / "digits-search.png") == (720, 420)
    assert not (tmp_path / "without" / "digits-edge.png").exists()


def test_report_draws_them_again(tmp_path):
    train(tmp_path, "--model", "digits", "--no-compare", "--sharpness", "--sharpness-every", 3, "--find-lr")
    before = sorted(path.name for path in tmp_path.iterdir())
    for path in tmp_path.glob("*.png"):
        path.unlink()
    assert invoke("report", tmp_path).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [
        ("SGD", "linear"),
        ("adam", "constant"),
        ("RAdam", "exponential"),
        ("giadam", "polynomial"),
        ("AdamW", "inverse_sqrt"),
    ],
)
def test_optimizers_and_schedules_by_name(tmp_path, optimizer, schedule):
    train(tmp_path, "--model", "digits", "--optimizer", optimizer, "--schedule", schedule.upper(), "--ema", 0)
    saved = record(tmp_path, "digits")
    assert saved["settings"]["optimizer"] == optimizer.lower()
    assert saved["settings"]["schedule"] == schedule
    assert saved["ours"]["averaged"] is None
    if optimizer == "giadam":
        # the start of the second moment makes it another algorithm than its neighbour
        assert saved["max_loss_difference"] > 1e-4
        assert "no GIAdam" in saved["note"]
    else:
        assert saved["max_loss_difference"] < 1e-4


def test_schedules_have_their_shapes():
    def rates(schedule, warmup):
        options = {**BASE, "schedule": schedule, "warmup": warmup, "steps": 12}
        return config.TrainConfig.from_options(**options).build_schedule().values(12).tolist()

    assert rates("linear", 2)[:3] == [0.5, 1.0, 1.0]
    assert rates("linear", 2)[-1] == pytest.approx(0.1)
    assert rates("cosine", 2)[7] == pytest.approx(0.5)
    assert rates("exponential", 2)[7] == pytest.approx(0.1)
    assert rates("polynomial", 2)[7] == pytest.approx(0.25)
    assert rates("inverse_sqrt", 2)[4] == pytest.approx(0.5**0.5)
    assert rates("constant", 0) == [1.0] * 12
    assert rates("cosine", 12)[-1] == 1.0


def test_the_same_seed_gives_the_same_run(tmp_path, monkeypatch):
    losses, weights = [], []
    real = training.build

    def build(*args):
        model = real(*args)
        weights.append([param.tolist() for param in model.parameters()])
        return model

    monkeypatch.setattr(training, "build", build)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(tmp_path / name, "--model", "digits", "--seed", seed, "--no-compare", "--backend", "reference")
        losses.append(record(tmp_path / name, "digits")["ours"]["losses"])
    assert losses[0] == losses[1] != losses[2]
    assert weights[0] == weights[1] != weights[2]
    assert record(tmp_path / "a", "digits")["backend"] == "reference"


def test_no_compare_trains_ours_alone(tmp_path):
    result = train(tmp_path, "--model", "digits", "--no-compare", "--max-grad-norm", 0)
    saved = record(tmp_path, "digits")
    assert saved["theirs"] is None
    assert saved["max_loss_difference"] is None
    assert "largest difference" not in result.output
    with (tmp_path / "digits.csv").open(newline="") as file:
        assert {row["clip_coef"] for row in csv.DictReader(file)} == {"1.0"}


def test_a_training_that_diverges_is_reported(tmp_path):
    result = train(tmp_path, "--model", "digits", "--optimizer", "sgd", "--lr", "1e30", "--max-grad-norm", 0)
    assert record(tmp_path, "digits")["ours"]["losses"][-1] is None
    assert "nan" in result.output
    assert png_size(tmp_path / "digits.png") == (720, 820)


def test_batch_norms_follow_the_averaged_weights(tmp_path, monkeypatch):
    seen = []
    real = loops.update_bn
    monkeypatch.setattr(loops, "update_bn", lambda batches, model: seen.append(model) or real(batches, model))
    train(tmp_path, "--model", "digits")
    assert [type(model).__name__ for model in seen] == ["Sequential", "AveragedModel"]
    batch_norms = [[m for m in model.modules() if hasattr(m, "running_mean")] for model in seen]
    for ours, theirs in zip(*batch_norms, strict=True):
        # a cumulative mean over 1438 images in slices of 256
        assert int(ours.num_batches_tracked) == int(theirs.num_batches_tracked) == 6
        assert ours.running_mean.allclose(theirs.running_mean, atol=1e-4)


def test_report_redraws(trained, tmp_path):
    out, results = trained
    for name in ("gpt.json", "gpt.csv", "digits.json", "digits.csv"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    result = invoke("report", tmp_path)
    assert result.exit_code == 0, result.output
    for model in config.MODELS:
        assert (tmp_path / f"{model}.png").read_bytes() == (out / f"{model}.png").read_bytes()
        shown = results[model].output
        table = shown[shown.index("┏") : shown.index("written:")]
        assert table in result.output


def test_chart_shows_the_telemetry(trained):
    saved, columns = report.read(trained[0] / "gpt.json")
    loss, lr, norm, clip = report.draw(saved, columns).axes
    assert loss.lines[0].get_ydata().tolist() == saved["ours"]["losses"]
    assert loss.lines[1].get_ydata().tolist() == saved["theirs"]["losses"]
    assert lr.lines[0].get_ydata().tolist() == columns["lr"]
    assert norm.lines[0].get_ydata().tolist() == columns["grad_norm"]
    assert norm.get_yscale() == "log"
    assert clip.lines[0].get_ydata().tolist() == columns["clip_coef"]


def test_report_names_the_error_of_a_file(trained, tmp_path):
    out, _ = trained
    text, rows = (out / "gpt.json").read_text(), (out / "gpt.csv").read_text()
    path, table = tmp_path / "gpt.json", tmp_path / "gpt.csv"
    table.write_text(rows)
    fewer = rows[: rows.rindex("\n", 0, -1) + 1]
    broken = [
        (text[: len(text) // 2], rows, "must be complete JSON"),
        ("[]", rows, "must be of"),
        (text.replace('"version": 1', '"version": 2', 1), rows, "must be of"),
        (text.replace('"stage_median"', '"other"'), rows, "must be complete"),
        (text, fewer, "must have 6 rows"),
        (text, rows.replace("grad_norm,", "norm,", 1), "must have the column 'grad_norm'"),
    ]
    for first, second, message in broken:
        path.write_text(first)
        table.write_text(second)
        check_one_line(invoke("report", path), message)
    table.unlink()
    path.write_text(text)
    check_one_line(invoke("report", path), "gpt.csv")
    check_one_line(invoke("report", tmp_path / "nothing.json"), "nothing.json")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model", "bert"], ["--model", "'gpt'", "'bert'"]),
        (["--optimizer", "lion"], ["--optimizer", "'giadam'", "'lion'"]),
        (["--schedule", "step"], ["--schedule", "'cosine'", "'step'"]),
        (["--steps", "-3"], ["--steps must be >= 1, got -3."]),
        (["--steps", "0"], ["--steps must be >= 1, got 0."]),
        (["--steps", "ten"], ["--steps", "ten"]),
        (["--steps", "5", "--warmup", "6"], ["--warmup must be <= --steps, which is 5, got 6."]),
        (["--warmup", "-1"], ["--warmup must be >= 0, got -1."]),
        (["--batch-size", "0"], ["--batch-size must be >= 1, got 0."]),
        (["--lr", "nan"], ["--lr must be finite and >= 0, got nan."]),
        (["--weight-decay", "-1"], ["--weight-decay must be finite and >= 0, got -1.0."]),
        (["--max-grad-norm", "inf"], ["--max-grad-norm must be finite", "inf"]),
        (["--ema", "1"], ["--ema must lie in [0, 1), got 1.0."]),
        (["--seed", "-1"], ["--seed must be >= 0, got -1."]),
        (["--threads", "0"], ["--threads must be >= 1, got 0."]),
        (["--sharpness", "--sharpness-every", "0"], ["--sharpness-every must be >= 1, got 0."]),
        (["--backend", "tpu"], ["--backend must be one of", "'tpu'"]),
        (["--backend", "cuda"], ["cuda"]),
        (["--frobnicate"], ["--frobnicate"]),
        (["extra"], ["extra"]),
    ],
)
def test_bad_input_is_one_line(args, words):
    check_one_line(invoke("train", *args), *words)


def test_out_must_not_be_a_file(tmp_path):
    file = tmp_path / "taken"
    file.write_text("")
    for out in (file, file / "below"):
        check_one_line(invoke("train", "--out", out), "--out must be a folder", str(out))


def test_unknown_command_and_help():
    check_one_line(invoke("trane"), "trane")
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(name in result.output for name in ("doctor", "train", "report"))
    assert "--max-grad-norm" in invoke("train", "--help").output
    assert "fused-warmup, version" in invoke("--version").output


def test_doctor_names_versions_machine_and_backends(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    for word in (*machine.versions().values(), machine.cpu_model(), "in use)", "reference and cpu work"):
        assert word in result.output
    for name in ("reference", "cpu", "triton", "cuda"):
        assert f"backend {name}" in result.output


def test_doctor_shows_the_ledger():
    result = invoke("doctor", "--traffic")
    assert result.exit_code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.output.splitlines()]
    totals = {(name, options): (launches, total) for name, options, launches, *_, total in filter(None, rows)}
    assert totals["Adam, AdamW, GIAdam", "none"] == ("3", "28")
    assert totals["Adam, AdamW, GIAdam", "clip"] == ("3", "32")
    assert totals["RAdam", "clip"] == ("3", "32")
    assert totals["RAdam", "EMA"] == ("3", "36")
    assert totals["AdamP", "clip"] == ("5", "44")
    # launches, bytes held and moved per parameter; no mode takes a launch more
    held = {tuple(row[:3]): row[3:] for row in rows if len(row) == 7}
    assert held["float32", "float32", "nearest"] == ["3", "12", "28", "80.9 GB"]
    assert held["float32", "bfloat16", "nearest"] == ["3", "8", "20", "53.9 GB"]
    numbers = {
        "nearest": (10, 22),
        "stochastic": (10, 22),
        "kahan": (12, 26),
        "split": (12, 26),
        "master": (14, 30),
    }
    for mode, (kept, moved) in numbers.items():
        assert held["bfloat16", "float32", mode][:3] == ["3", str(kept), str(moved)]
        assert held["bfloat16", "bfloat16", mode][:3] == ["3", str(kept - 4), str(moved - 8)]
    assert held["bfloat16", "float32", "split"][3] == "80.9 GB"


def test_doctor_predicts_times_on_a_gpu(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = invoke("doctor", "--traffic", "--gpu", "h100")
    assert result.exit_code == 0, result.output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.output.splitlines()]
    steps = {(row[0], row[1]): row[2:] for row in rows if len(row) == 5}
    # 28 bytes of 124M and of 1.236 billion parameters at 2,979 GB/s are 1.17 and 11.62 ms
    assert steps["Adam, AdamW, GIAdam", "none"] == ["1.19", "11.66", "needs 108 GB"]
    assert len(steps) == 28
    kernels = {(row[0], row[1], row[2]): row[3:] for row in rows if len(row) == 8}
    assert kernels["Adam, AdamW, GIAdam", "none", "update"][0] == "1169.7"
    assert "predicted milliseconds of a step on one H100" in result.output


def test_doctor_lists_the_gpus_that_it_has():
    result = invoke("doctor", "--traffic", "--gpu", "V100")
    assert result.exit_code == 2
    assert "must be one of T4, A100, H100, H200, B200, RTX 4090, RTX 5090, got 'V100'" in result.stderr
    result = invoke("doctor", "--gpu", "H100")
    assert result.exit_code == 2
    assert "--gpu needs --traffic" in result.stderr


def test_doctor_fails_when_a_step_does(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    from fused_warmup.backends.reference import ReferenceBackend

    monkeypatch.setattr(ReferenceBackend, "step", lambda self, plan: None)
    assert doctor.backend_problem("cpu") is None
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "gives 1.0" in result.output
    assert result.stderr.strip().endswith("got trouble with reference.")

    def fail(self, plan):
        raise RuntimeError("broken")

    monkeypatch.setattr(ReferenceBackend, "step", fail)
    assert "a step fails: broken" in invoke("doctor").output


def test_doctor_makes_a_step_with_every_available_backend(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    real, tried = fw.SGD, []

    def sgd(params, *, lr, backend):
        tried.append((backend, params[0].device.type))
        if backend == "triton":
            raise RuntimeError("no assembler")
        return real(params, lr=lr, backend="reference")

    monkeypatch.setattr(fw, "SGD", sgd)
    monkeypatch.setattr(doctor, "unavailable_reason", lambda name: None)
    monkeypatch.setattr(doctor, "device_type", lambda name: "cpu")
    output = re.sub(" +", " ", invoke("doctor").output)
    assert tried == [(name, "cpu") for name in ("reference", "cpu", "triton", "cuda")]
    assert "backend triton not available: a step fails: no assembler" in output
    assert "backend cuda available" in output


def test_the_processor_has_a_name(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: A Chip 9000\n")
    assert machine.cpu_model(file) == "A Chip 9000"
    assert machine.cpu_model(tmp_path / "none")


def test_text_is_split_by_file_and_shifted_by_one(tmp_path):
    for i in range(20):
        (tmp_path / f"m{i:02}.py").write_text(chr(ord("a") + i) * 300)
    loaded = data.text(tmp_path, context=8)
    assert loaded.classes == 20
    # files 9 and 19 are for validation, and no window of the training holds them
    assert set(loaded.validation.inputs.unique().tolist()) == {9, 19}
    assert not {9, 19} & set(loaded.train.inputs.unique().tolist())
    for split in (loaded.train, loaded.validation):
        assert split.inputs[:, 1:].equal(split.targets[:, :-1])
    # the one window that spans two files: its last target is the first character of the next file
    assert loaded.train.targets[300 - 8, -1] == 1
    with pytest.raises(ValueError, match="must hold the sources"):
        data.text(tmp_path / "nothing")


CODE = """
import sys
import fused_warmup
from fused_warmup.cli import main
extras = {'click', 'rich', 'matplotlib', 'sklearn'}
print(*extras & set(sys.modules), sep=',')
from fused_warmup.cli.group import cli
cli(['--help'], standalone_mode=False)
print(*extras & set(sys.modules), sep=',')
del sys.modules['fused_warmup.cli.group']
sys.modules['click'] = None
main()
"""


def test_extras_are_imported_when_they_are_used():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[0] == "", done.stderr
    # listing the commands imports none of them
    assert done.stdout.splitlines()[-1] == "click"
    assert (done.returncode, done.stderr.strip()) == (1, package.missing_extra("click"))


def test_a_missing_extra_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    check_one_line(invoke("train", *FEW), "pip install 'fused-warmup[cli,plot,data]'")


def test_python_dash_m_runs_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fused_warmup", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("fused_warmup", run_name="__main__")
    assert stop.value.code == 0
    assert "fused-warmup, version" in capsys.readouterr().out
