"""``fused-warmup train --dtype bfloat16``: the parameters, their rounding, and the comparison."""

import json
import math
from functools import partial

import pytest
import torch
from cli import commands
from cli.commands import invoke

from fused_warmup.cli.train import command as training
from fused_warmup.cli.train import config, data, loops, report
from fused_warmup.reference.rounding import MODES, RESIDUES

STEPS = ("--steps", 4, "--batch-size", 2, "--warmup", 1)
train = partial(commands.train, steps=STEPS)


@pytest.fixture
def made(monkeypatch):
    """Loops of the trainings of a test."""
    kept = []

    def keep(kind):
        def make(*args):
            kept.append(kind(*args))
            return kept[-1]

        return make

    for name in ("FusedLoop", "TorchLoop"):
        monkeypatch.setattr(training, name, keep(getattr(loops, name)))
    return kept


@pytest.mark.parametrize(("model", "mode"), [("gpt", "kahan"), *(("digits", mode) for mode in MODES)])
def test_both_loops_train_the_16_bit_model(tmp_path, made, model, mode):
    result = train(
        tmp_path, "--model", model, "--dtype", "BFloat16", "--param-rounding", mode.upper(), "--seed", 5
    )
    ours = made[0]
    for loop in made:
        assert {param.dtype for param in loop.model.parameters()} == {torch.bfloat16}
    assert (ours.opt.param_groups[0]["param_rounding"], ours.opt.param_groups[0]["rounding_seed"]) == (
        mode,
        5,
    )
    states = {name for state in ours.opt.state.values() for name in state}
    residue = {RESIDUES[mode][0]} if mode in RESIDUES else set()
    assert states & {name for name, _ in RESIDUES.values()} == residue
    saved = json.loads((tmp_path / f"{model}.json").read_text())
    assert (saved["settings"]["dtype"], saved["settings"]["param_rounding"]) == ("bfloat16", mode)
    for run in (saved["ours"], saved["theirs"]):
        assert len(run["losses"]) == 4
        assert all(map(math.isfinite, [*run["losses"], run["validation"]["loss"], run["averaged"]["loss"]]))
    # the same weights and the same batch
    assert saved["ours"]["losses"][0] == saved["theirs"]["losses"][0]
    shown = " ".join(result.output.split())
    assert f"cosine, bfloat16, {mode}" in shown
    assert f"by {mode!r} with float32 states, so the losses differ." in shown


def test_weights_start_at_the_rounded_float32_ones(tmp_path, made):
    for dtype in config.DTYPES:
        train(tmp_path / dtype, "--model", "digits", "--no-compare", "--lr", 0, "--dtype", dtype)
    plain, short = (loop.model for loop in made)
    for one, other in zip(plain.parameters(), short.parameters(), strict=True):
        assert one.dtype == torch.float32
        assert one.to(torch.bfloat16).equal(other)


def test_the_loss_is_float32():
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(15).view(3, 5) % 7
    loss = loops.loss_of(logits, targets)
    assert loss.dtype == torch.float32
    assert loss == loops.loss_of(logits.float(), targets)


def test_images_are_exact_in_bfloat16():
    plain, short = data.load("digits"), data.load("digits", torch.bfloat16)
    for one, other in ((plain.train, short.train), (plain.validation, short.validation)):
        assert other.inputs.dtype == torch.bfloat16
        assert other.inputs.float().equal(one.inputs)


@pytest.mark.parametrize("args", [(), ("--dtype", "bfloat16", "--no-compare")], ids=str)
def test_a_training_without_this_difference_has_no_note(tmp_path, args):
    result = train(tmp_path, "--model", "digits", *args)
    assert "so the losses differ" not in " ".join(result.output.split())
    assert json.loads((tmp_path / "digits.json").read_text())["note"] == ""


@pytest.mark.parametrize("dtype", config.DTYPES)
def test_states_have_the_dtype_that_is_asked_for(tmp_path, made, dtype):
    result = train(tmp_path, "--model", "digits", "--dtype", dtype, "--state-dtype", "BFloat16")
    states = [state["exp_avg_sq"] for state in made[0].opt.state.values()]
    assert {state.dtype for state in states} == {torch.bfloat16}
    shown = " ".join(result.output.split())
    assert "bfloat16 states, so" in shown or "bfloat16 ones, so the losses differ." in shown
    assert json.loads((tmp_path / "digits.json").read_text())["settings"]["state_dtype"] == "bfloat16"
    assert ", bfloat16 states" in " ".join(invoke("report", tmp_path).output.split())


def test_report_shows_the_dtype_and_reads_records_without_one(tmp_path):
    train(tmp_path, "--model", "digits", "--dtype", "bfloat16", "--param-rounding", "split")
    assert "bfloat16, split" in " ".join(invoke("report", tmp_path).output.split())
    path = tmp_path / "digits.json"
    saved = json.loads(path.read_text())
    for name in ("dtype", "param_rounding", "state_dtype"):
        del saved["settings"][name]
    path.write_text(json.dumps(saved))
    assert report.title_of(report.read(path)[0]).endswith("cosine")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--state-dtype", "half"], "train: --state-dtype must be one of 'float32', 'bfloat16', got 'half'."),
        (["--dtype", "int8"], "train: --dtype must be one of 'float32', 'bfloat16', got 'int8'."),
        (
            ["--dtype", "bfloat16", "--param-rounding", "up"],
            "train: --param-rounding must be one of 'nearest', 'stochastic', 'kahan', 'split', 'master', got 'up'.",
        ),
        *(
            (
                ["--param-rounding", mode],
                f"train: --param-rounding must be 'nearest' for --dtype float32, got {mode!r}.",
            )
            for mode in MODES[1:]
        ),
    ],
)
def test_bad_values_are_one_line(tmp_path, args, message):
    result = invoke("train", *STEPS, *args, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.strip() == message
    assert not (tmp_path / "out").exists()
