"""``make gpu`` and its page, with times that are made up; the tables of docs/roofline.md."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, on_gpu, roofline
from fused_warmup.plan.roofline import find_device

ROOT = Path(__file__).resolve().parents[2]
WHERE = {"gpu": "NVIDIA H100 80GB HBM3", "versions": {"torch": "2.11"}, "copy_gb_per_s": 3009.0}
SETUP = gpu.Setup("cuda", ["cuda", "triton"], 3009.0, find_device("H100"))


def side(device, host=100e-6, replayed=()):
    return gpu.Side(lambda: None, False, device=[device], replayed=list(replayed), host=[host])


def rows(workload=gpu.WORKLOADS[0], optimizer="Adam", mode="step"):
    found = {"cuda": side(1536e-6, replayed=[1533e-6]), "triton": side(1900e-6), "torch fused": side(1700e-6)}
    return gpu.rows_of(workload, optimizer, mode, found, SETUP)


def test_tables_of_the_page_are_what_the_code_gives():
    text = roofline.PAGE.read_text()
    assert roofline.filled(text) == text, "python -m benchmarks.roofline writes them"


def test_rows_have_the_prediction():
    cuda, triton, fused = rows()
    predicted = gpu.traffic_of(gpu.WORKLOADS[0], "Adam", "step").predict("H100").us
    assert (cuda.predicted_us, triton.predicted_us, fused.predicted_us) == (predicted, predicted, None)
    assert cuda.of_predicted == pytest.approx(1536 / predicted)
    assert cuda.gb_per_s == pytest.approx(160e6 * 28 / 1536e-6 / 1e9)
    assert (cuda.ratio, cuda.host_ratio) == pytest.approx((1700 / 1536, 1.0))
    assert (cuda.replay_us, triton.replay_us) == (pytest.approx(1533), None)


def test_a_gpu_that_the_model_lacks_has_no_predictions():
    assert gpu.known_gpu({"gpu": "NVIDIA L40"}, 700.0) is None
    assert gpu.known_gpu({}, 700.0) is None
    assert gpu.known_gpu(WHERE, 2900.0).copy == 2900.0


def test_the_page_names_tests_misses_and_what_is_left_out():
    page = gpu.to_markdown(rows(), WHERE | {"tests": "12 passed in 3.00s", "left_out": ["SGD", "AdamW"]})
    assert "Tests: 12 passed in 3.00s." in page
    assert "Left out: SGD; AdamW." in page
    missed = page.split("must be explained")[1]
    assert "- 10 x 16M: Adam, step, triton: 1.25 of the prediction" in missed
    assert "cuda" not in missed
    (line,) = [line for line in page.splitlines() if line.startswith("| 10 x 16M: Adam, step | cuda |")]
    assert [cell.strip() for cell in line.split("|")[-3:-1]] == ["1524.2", "1.01"]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build", "580.159.04"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19", "535.104.05"),
        ("GCC version:  gcc version 12.2.0", "unknown"),
    ],
)
def test_the_version_of_the_driver(text, version):
    """The name of the architecture has digits too."""
    assert gpu.driver_version(text) == version


def test_the_page_is_written_after_every_case(monkeypatch, tmp_path):
    """What a time limit or an error cuts off is named; what was measured before stays."""
    pages = []

    def measure(workload, optimizer, mode, setup):
        pages.append((tmp_path / "nvidia-h100-80gb-hbm3.json").exists())
        if len(pages) == 2:
            raise RuntimeError("out of memory\nand more")
        return rows(workload, optimizer, mode)

    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "copy_speed", lambda device, n_bytes: 3009.0)
    monkeypatch.setattr(gpu, "machine", lambda *_: dict(WHERE))
    clock = iter(range(1000))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    assert gpu.main(["--seconds", "3", "--tests", "3 passed"]) == 0
    assert pages == [False, True, True]
    page = json.loads((tmp_path / "nvidia-h100-80gb-hbm3.json").read_text())
    names = [f"{w.name}: {o}, {m}" for o, m in gpu.CASES for w in gpu.WORKLOADS]
    assert page["machine"]["left_out"] == [f"{names[1]}: out of memory", *names[3:]]
    assert {row["workload"] for row in page["rows"]} == {gpu.WORKLOADS[0].name, gpu.WORKLOADS[2].name}
    assert page["machine"]["tests"] == "3 passed"


def test_the_most_important_rows_come_first():
    assert gpu.CASES[:2] == (("Adam", "step"), ("Adam", "clip + step"))
    # torch.compile takes longest
    assert gpu.CASES[-1] == ("AdamW", "step")


def test_a_peer_that_fails_costs_no_other_row(monkeypatch, capsys):
    def fail():
        raise OSError("no compiler of C")

    found = {"cpu": side(1.0), "torch compiled": gpu.Side(fail, False)}
    monkeypatch.setattr(gpu, "sides", lambda *_: dict(found))
    setup = gpu.Setup("cpu", ["cpu"], 1.0, quick=True)
    assert [row.side for row in gpu.measure(gpu.WORKLOADS[3], "SGD", "step", setup)] == ["cpu"]
    assert "torch compiled: no compiler of C" in capsys.readouterr().out
    found["cpu"] = gpu.Side(fail, False)
    with pytest.raises(OSError, match="no compiler"):
        gpu.measure(gpu.WORKLOADS[3], "SGD", "step", setup)


def test_the_benchmark_needs_torch_and_numpy_only():
    """Packages of the extras and of the tests are made impossible to import."""
    blocked = ("click", "rich", "pytest", "pytest_benchmark", "scipy", "matplotlib", "sklearn", "hypothesis")
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked}))\nimport benchmarks.gpu, benchmarks.on_gpu"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with everything, on which no command runs; returns the commands."""
    commands = []

    def run(command, seconds, environment, output=None):
        commands.append((list(command), environment.get("FUSED_WARMUP_CUDA")))
        return 0, False

    monkeypatch.setattr(on_gpu, "run", run)
    monkeypatch.setattr(on_gpu, "obstacle", lambda: None)
    monkeypatch.setattr(on_gpu, "build_needs", lambda: [])
    monkeypatch.setattr(on_gpu, "usable_backends", lambda: ["cuda", "triton"])
    monkeypatch.setattr(on_gpu.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(on_gpu, "ROOT", tmp_path)
    monkeypatch.setattr(on_gpu, "LOG", tmp_path / "build" / "kernels.log")
    return commands


def test_all_parts_run_in_order(machine, capsys):
    assert on_gpu.main() == 0
    (build, cuda), (tests, _), (bench, _) = machine
    assert (build[1:], cuda) == (["setup.py", "kernels"], "1")
    assert tests[1:3] == ["-m", "pytest"]
    assert bench[1:4] == ["-m", "benchmarks.gpu", "--seconds"]
    assert on_gpu.ALL - 60 < float(bench[4]) < on_gpu.ALL
    assert on_gpu.ALL <= 480


def test_without_nvcc_the_cpu_extension_is_built(machine, monkeypatch, capsys):
    monkeypatch.setattr(on_gpu.shutil, "which", lambda name: None)
    assert on_gpu.main() == 0
    assert machine[0][1] == "0"
    assert "nvcc is not on PATH (install the CUDA toolkit)" in capsys.readouterr().out


def test_a_failed_build_of_cuda_leaves_the_cpu_extension(machine, monkeypatch, capsys):
    def run(command, seconds, environment, output):
        machine.append(environment.get("FUSED_WARMUP_CUDA"))
        return (1 if environment.get("FUSED_WARMUP_CUDA") == "1" else 0), False

    monkeypatch.setattr(on_gpu, "run", run)
    on_gpu.build(60.0)
    assert machine == ["1", "0"]
    assert "the build failed, see build/kernels.log" in capsys.readouterr().out


def test_what_is_missing_is_one_line_each(machine, monkeypatch, capsys):
    monkeypatch.setattr(on_gpu, "build_needs", lambda: ["pybind11 (pip install pybind11)"])
    monkeypatch.setattr(on_gpu, "has", lambda module: module != "pytest")
    assert on_gpu.main() == 0
    out = capsys.readouterr().out.splitlines()
    assert (
        out[0] == "make gpu: no extension is built, only Triton runs: pybind11 (pip install pybind11) missing"
    )
    assert out[1] == "make gpu: the tests do not run: pytest is missing (pip install pytest)"
    ((bench, _),) = machine
    assert bench[-1] == "not run, pytest is missing"


def test_nothing_useful_is_an_error(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(on_gpu, "has", lambda module: module != "torch")
        assert on_gpu.main() == 1
        assert capsys.readouterr().out == "make gpu: torch must be installed, got none; pip install torch\n"
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        assert on_gpu.main() == 1
        assert capsys.readouterr().out.startswith("make gpu: a CUDA device must be there, got none; torch ")


def test_no_backend_is_an_error(machine, monkeypatch, capsys):
    monkeypatch.setattr(on_gpu, "usable_backends", lambda: [])
    assert on_gpu.main() == 1
    assert "neither the backend cuda nor triton works here" in capsys.readouterr().out


def test_a_failed_test_is_an_error_after_the_measurement(machine, monkeypatch):
    monkeypatch.setattr(on_gpu, "run_tests", lambda seconds: ("1 failed, 3 passed in 1.00s", False))
    assert on_gpu.main() == 1
    assert machine[-1][0][-1] == "1 failed, 3 passed in 1.00s"


def test_needs_of_a_build(monkeypatch):
    monkeypatch.setattr(on_gpu, "has", lambda module: False)
    monkeypatch.setattr(on_gpu.shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", "clang++ -O2")
    needs = on_gpu.build_needs()
    assert needs[:2] == ["pybind11 (pip install pybind11)", "ninja (pip install ninja)"]
    assert needs[2].startswith("the compiler clang++")


@pytest.mark.parametrize(
    ("report", "text"),
    [
        (
            "....\n212 passed, 3 skipped, 1 warning in 61.02s (0:01:01)\n",
            "212 passed, 3 skipped, 1 warning in 61.02s (0:01:01)",
        ),
        ("F\n=== 1 failed, 2 passed in 0.10s ===\n", "1 failed, 2 passed in 0.10s"),
        ("!!! KeyboardInterrupt !!!\n3 passed in 2.00s\n", "3 passed in 2.00s"),
        ("Traceback", "no summary, see build/tests.log"),
    ],
)
def test_outcome_of_the_tests(report, text):
    assert on_gpu.outcome(report) == text


def test_a_command_that_takes_too_long_is_interrupted(tmp_path):
    script = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(7))\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    with (tmp_path / "log").open("w") as log:
        code, stopped = on_gpu.run([sys.executable, "-c", script], 3.0, {}, log.fileno())
    assert (code, stopped) == (7, True)
