"""The record of the steps: fields, pages, files, and that keeping it changes nothing."""

import copy
import csv
import gc
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import BACKENDS, assert_same_bits, make_params, set_grads
from torch.utils._python_dispatch import TorchDispatchMode

import fused_warmup as fw
from fused_warmup import schedules
from fused_warmup.optim.telemetry import Telemetry
from fused_warmup.plan.structs import COUNTERS, TELEMETRY

CAPACITY, KEPT = 1024, 16_384


@pytest.mark.parametrize("backend", BACKENDS)
def test_fields(backend):
    params = make_params(torch.float32, [(7, 3), (), (0,), (40_000,)])
    opt = fw.RAdam(params, lr=0.5, schedule=schedules.warmup(4), max_grad_norm=1.5, backend=backend)
    for step in range(8):
        set_grads(params, step)
        if step != 3:
            opt.record_loss(torch.tensor(float(step), requires_grad=True) if step % 2 else float(step))
        opt.step()
    history = opt.telemetry.history()
    assert tuple(history) == TELEMETRY
    assert all(value.dtype == torch.float64 and value.shape == (8,) for value in history.values())
    assert history["step"].tolist() == list(range(1, 9))
    assert history["lr"].tolist() == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5, 0.5]
    grads = [p.grad.double() for p in params]
    assert history["grad_norm"][-1].item() == pytest.approx(
        math.sqrt(sum(float(g.square().sum()) for g in grads))
    )
    assert history["grad_norm_l1"][-1].item() == pytest.approx(sum(float(g.abs().sum()) for g in grads))
    expected = (1.5 / (history["grad_norm"] + 1e-6)).clamp(max=1.0)
    assert torch.allclose(history["clip_coef"], expected, rtol=1e-15, atol=0)
    assert history["rect"][:5].tolist() == [0.0] * 5
    assert history["rect"][5].item() == pytest.approx(0.025821, abs=1e-6)
    assert history["loss"][:3].tolist() == [0.0, 1.0, 2.0]
    assert math.isnan(history["loss"][3])
    assert history["sharpness"].isnan().all()
    assert not history["skipped"].any()
    assert opt.telemetry.latest() == {name: value[-1].item() for name, value in history.items()} | {
        "sharpness": pytest.approx(math.nan, nan_ok=True)
    }


@pytest.mark.parametrize("steps", [0, 1, 1023, 1024, 1025, 2048, 2500])
def test_pages(steps):
    """The history is whole when pages fill, at every boundary."""
    x = torch.nn.Parameter(torch.zeros(1))
    opt = fw.SGD([x], lr=0.1)
    x.grad = torch.zeros(1)
    for step in range(steps):
        opt.record_loss(float(step))
        opt.step()
    history = opt.telemetry.history()
    assert len(opt.telemetry) == steps
    assert history["loss"].tolist() == list(range(steps))
    assert history["step"].tolist() == list(range(1, steps + 1))
    if steps:
        assert opt.telemetry.latest()["loss"] == steps - 1
    else:
        with pytest.raises(RuntimeError, match="must follow a step"):
            opt.telemetry.latest()


def test_csv(tmp_path):
    params = make_params(torch.float32, [(5,)])
    opt = fw.Adam(params)
    for step in range(3):
        set_grads(params, step)
        opt.step()
    opt.telemetry.to_csv(tmp_path / "t.csv")
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(TELEMETRY)
    history = opt.telemetry.history()
    assert [float(row["grad_norm"]) for row in rows] == history["grad_norm"].tolist()


@pytest.mark.parametrize("clip", [None, 0.5])
def test_off_changes_nothing_else(clip):
    a, b = make_params(torch.float32), make_params(torch.float32)
    on, off = (fw.Adam(p, max_grad_norm=clip, telemetry=t) for p, t in ((a, True), (b, False)))
    for step in range(5):
        for params, opt in ((a, on), (b, off)):
            set_grads(params, step)
            opt.record_loss(1.0)
            opt.step()
    for p, q in zip(a, b, strict=True):
        assert_same_bits("param", p, q)
    assert len(off.telemetry) == 0
    assert off.telemetry.history()["lr"].shape == (0,)
    assert off.get_last_lr() == on.get_last_lr()


def test_loss_of_the_closure_is_recorded():
    x = torch.nn.Parameter(torch.tensor([3.0]))
    opt = fw.SGD([x], lr=0.1)

    def closure():
        opt.zero_grad()
        loss = (x**2).sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == 9.0
    assert opt.telemetry.latest()["loss"] == 9.0


def test_step_without_any_gradient_counts():
    """Schedules move on, as they do with a torch scheduler; no parameter does."""
    x = torch.nn.Parameter(torch.ones(2))
    opt = fw.Adam([x], schedule=schedules.linear(1.0, 0.0, 4), lr=1.0)
    opt.step()
    opt.step()
    assert opt.telemetry.history()["lr"].tolist() == [1.0, 0.75]
    assert opt.telemetry.history()["grad_norm"].tolist() == [0.0, 0.0]
    assert x.tolist() == [1.0, 1.0]
    assert not opt.state


def live_tensors():
    """Return the number of tensors in memory."""
    gc.collect()
    return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())


def test_looking_at_every_step_keeps_few_tensors():
    """And looking again without a step between keeps none."""
    x = torch.nn.Parameter(torch.zeros(3))
    opt = fw.SGD([x])
    x.grad = torch.ones(3)
    opt.step()
    before = live_tensors()
    for step in range(2, 2101):
        opt.step()
        assert opt.telemetry.latest()["step"] == opt.telemetry.latest()["step"] == step
    assert live_tensors() <= before
    assert opt.telemetry.history()["step"].tolist() == list(range(1, 2101))
    opt.telemetry.latest()
    assert live_tensors() <= before


# the bound


def made(steps=0, **options):
    """Return a telemetry that a device has written."""
    telemetry = Telemetry(**options)
    telemetry.allocate(torch.device("cpu"), torch.zeros(len(COUNTERS), dtype=torch.int64))
    write(telemetry, steps)
    return telemetry


def write(telemetry, steps, *, eager=True, skipped=False):
    """Write rows into the ring buffer and count them, as a device does; replayed steps are not noted."""
    counters = telemetry._counters
    while steps:
        # up to the next copy
        count = min(steps, CAPACITY - telemetry._uncopied)
        places = (counters[1] + torch.arange(count)) % CAPACITY
        row = torch.zeros(count, len(TELEMETRY), dtype=torch.float64)
        row[:, 0] = counters[0] + (0.0 if skipped else torch.arange(1.0, count + 1.0))
        row[:, TELEMETRY.index("skipped")] = float(skipped)
        row[:, TELEMETRY.index("grad_norm")] = 1.0 / (1.0 + row[:, 0])
        row[:, TELEMETRY.index("loss")] = math.nan
        telemetry.ring_buffer[places] = row
        counters += torch.tensor([0 if skipped else count, count])
        for _ in range(count if eager else 0):
            telemetry.advance()
        steps -= count


class LargestResult(TorchDispatchMode):
    """Most elements of a tensor that an operator has returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def largest(call):
    with LargestResult() as mode:
        call()
    return mode.numel


@pytest.mark.parametrize("read", [False, True], ids=["unread", "read"])
def test_memory_is_bounded(read):
    """The last 16,384 rows, in 1.2 MB, whether somebody reads or not."""
    telemetry, tensors = made(30_000), live_tensors()
    for _ in range(27):
        write(telemetry, 10_000)
        if read:
            len(telemetry.rows())
    assert live_tensors() <= tensors
    assert len(telemetry) == KEPT
    assert len(pickle.dumps(telemetry)) < (KEPT + CAPACITY) * 72 + 10_000
    assert telemetry.history()["step"].tolist() == list(range(300_001 - KEPT, 300_001))
    assert telemetry.kept_rows()[:, 0].tolist() == list(range(300_001 - CAPACITY, 300_001))
    assert telemetry.dropped == 300_000 - KEPT


def test_all_rows_on_request():
    telemetry = made(40_000, keep_all=True)
    assert (
        telemetry.history()["step"].tolist() == telemetry.kept_rows()[:, 0].tolist() == list(range(1, 40_001))
    )
    assert (len(telemetry), telemetry.dropped) == (40_000, 0)


@pytest.mark.parametrize("steps", [KEPT - 1, KEPT, KEPT + 1, 2 * KEPT, 2 * KEPT + 1500])
def test_the_bound_drops_the_oldest(steps):
    """Also if rows arrive in odd numbers."""
    telemetry = made()
    for begin in range(0, steps, 700):
        write(telemetry, min(700, steps - begin))
        assert len(telemetry) == min(begin + 700, steps, KEPT)
        telemetry.rows() if begin % 3 else telemetry.latest()
    assert telemetry.history()["step"].tolist() == list(range(max(1, steps - KEPT + 1), steps + 1))
    assert telemetry.dropped == max(0, steps - KEPT)


def test_reading_few_rows_copies_few():
    telemetry = made(5000)
    assert largest(lambda: write(telemetry, 1) or telemetry.latest()) == CAPACITY * len(TELEMETRY)
    telemetry = made(5000)
    assert largest(telemetry.latest) == len(TELEMETRY)
    assert largest(telemetry.__len__) <= len(COUNTERS)
    telemetry.rows()
    assert largest(telemetry.kept_rows) == CAPACITY * len(TELEMETRY)


def test_dropped_rows_are_counted():
    telemetry = made(10)
    write(telemetry, 3, skipped=True)
    assert telemetry.dropped == 0
    write(telemetry, 2000, eager=False)
    assert len(telemetry) == 13 + CAPACITY
    assert telemetry.history()["step"].tolist() == [*range(1, 11), 10, 10, 10, *range(987, 2011)]
    assert telemetry.dropped == 976
    assert made().dropped == Telemetry(False).dropped == 0


@pytest.mark.parametrize(("rows", "dropped"), [(None, 500), (500, 0), (20, 480)])
def test_a_resumed_record_may_lack_its_beginning(rows, dropped):
    """As that of a state dict of torch, a complete one, and one with the last rows do."""
    x = torch.nn.Parameter(torch.zeros(1))
    opt = fw.Adam([x], telemetry="all")
    x.grad = torch.ones(1)
    for _ in range(500):
        opt.step()
    saved = opt.state_dict()
    if rows is None:
        del saved["fused_warmup"]
    else:
        saved["fused_warmup"]["telemetry"] = saved["fused_warmup"]["telemetry"][-rows:]
    opt.load_state_dict(saved)
    opt.step()
    assert opt.telemetry.dropped == dropped
    assert opt.telemetry.latest()["step"] == 501


def test_a_long_record_is_loaded_up_to_the_bound():
    telemetry = made(2)
    assert telemetry.load_rows(made(20_000, keep_all=True).rows()) == 20_000
    assert telemetry.history()["step"].tolist() == list(range(20_001 - KEPT, 20_001))


def test_after_a_load_the_latest_row_is_a_loaded_one():
    telemetry = made(10)
    telemetry._counters.fill_(telemetry.load_rows(made(3).rows()))
    assert (telemetry.latest()["step"], len(telemetry)) == (3, 3)
    write(telemetry, 1)
    assert (telemetry.latest()["step"], len(telemetry)) == (4, 4)
    with pytest.raises(RuntimeError, match="must follow a step"):
        made().latest()


def test_loading_forgets_copies_under_way(monkeypatch):
    telemetry, short = made(), made(3)
    monkeypatch.setattr("fused_warmup.optim.telemetry._Copy.is_complete", lambda copy: False)
    write(telemetry, 1500, skipped=True)
    telemetry._counters.fill_(telemetry.load_rows(short.rows()))
    monkeypatch.undo()
    write(telemetry, 1500)
    assert telemetry.history()["step"].tolist() == list(range(1, 1504))


# the file


def table(path):
    """Return the rows of a file."""
    with path.open() as file:
        return [[float(x) for x in row.values()] for row in csv.DictReader(file)]


def steps_of(path):
    return [row[0] for row in table(path)]


def test_stream_has_every_row_in_the_format_of_to_csv(tmp_path):
    """Those before the call included, though the host keeps the last ones."""
    streamed, whole = made(300), made(300, keep_all=True)
    streamed.stream_to(tmp_path / "a.csv")
    assert len(steps_of(tmp_path / "a.csv")) == 300
    for count in (10, 20_000, 3000):
        for telemetry in (streamed, whole):
            write(telemetry, count)
        streamed.latest()
        assert len(steps_of(tmp_path / "a.csv")) == len(whole)
    streamed.stream_to(None)
    whole.to_csv(tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    write(streamed, 2000)
    assert len(streamed) == KEPT
    assert len(steps_of(tmp_path / "a.csv")) == 23_310


def test_steps_write_copies_that_are_complete(tmp_path, monkeypatch):
    """And never wait: a copy under way is written at the next event, rows in order, none twice."""
    path = tmp_path / "a.csv"
    telemetry, complete = made(), {"answer": True}
    monkeypatch.setattr("fused_warmup.optim.telemetry._Copy.is_complete", lambda copy: complete["answer"])
    telemetry.stream_to(path)
    write(telemetry, 1023)
    assert steps_of(path) == []
    write(telemetry, 1)
    assert len(steps_of(path)) == 1024
    complete["answer"] = False
    write(telemetry, 2048)
    assert len(steps_of(path)) == 1024
    complete["answer"] = True
    write(telemetry, 1024)
    assert steps_of(path) == list(range(1, 4097))


@pytest.mark.parametrize(
    "event",
    ["rows", "history", "latest", "__len__", "kept_rows", "__getstate__", "stream_to(None)", "same file"],
)
def test_events_that_complete_the_file(tmp_path, event):
    path = tmp_path / "a.csv"
    telemetry = made()
    telemetry.stream_to(str(path))
    write(telemetry, 5)
    if event == "stream_to(None)":
        telemetry.stream_to(None)
    elif event == "same file":
        telemetry.stream_to(path)
    else:
        getattr(telemetry, event)()
    assert steps_of(path) == [1, 2, 3, 4, 5]


def test_another_file_takes_the_rows_that_are_kept(tmp_path):
    one, two = tmp_path / "1.csv", tmp_path / "2.csv"
    telemetry = made()
    telemetry.stream_to(one)
    write(telemetry, 3)
    telemetry.stream_to(two)
    write(telemetry, 2)
    len(telemetry)
    assert steps_of(one) == [1, 2, 3]
    assert steps_of(two) == [1, 2, 3, 4, 5]


def test_the_first_step_may_be_skipped(tmp_path):
    telemetry = made()
    write(telemetry, 2, skipped=True)
    telemetry.stream_to(tmp_path / "a.csv")
    write(telemetry, 1)
    telemetry.stream_to(None)
    assert steps_of(tmp_path / "a.csv") == [0, 0, 1]


SCRIPT = """
import os, sys, torch, fused_warmup as fw
# threads of OpenMP do not survive a fork
torch.set_num_threads(1)
x = torch.nn.Parameter(torch.zeros(1))
x.grad = torch.ones(1)
opt = fw.SGD([x], lr=0.1)
opt.telemetry.stream_to(sys.argv[1])
for _ in range(1500):
    opt.step()
if sys.argv[2] == "fork" and not os.fork():
    print(opt.telemetry.latest()["step"])
    sys.exit()
if sys.argv[2] == "fork":
    os.wait()
if sys.argv[2] == "error":
    raise SystemExit("stopped")
"""


@pytest.mark.parametrize("end", ["error", "fork"])
def test_a_run_that_just_ends_leaves_a_complete_file(tmp_path, end):
    """Processes that a run forks write nothing."""
    path = tmp_path / "a.csv"
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, path, end], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == (end == "error"), run.stderr
    assert run.stderr.strip() == ("stopped" if end == "error" else "")
    assert steps_of(path) == list(range(1, 1501))


def test_a_deleted_optimizer_leaves_a_complete_file(tmp_path):
    x = torch.nn.Parameter(torch.zeros(1))
    x.grad = torch.ones(1)
    opt = fw.SGD([x], lr=0.1)
    opt.telemetry.stream_to(tmp_path / "a.csv")
    for _ in range(3):
        opt.step()
    assert steps_of(tmp_path / "a.csv") == []
    del opt
    gc.collect()
    assert steps_of(tmp_path / "a.csv") == [1, 2, 3]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_a_copy_of_the_optimizer_does_not_stream(tmp_path, copied):
    x = torch.nn.Parameter(torch.zeros(1))
    x.grad = torch.ones(1)
    opt = fw.SGD([x], lr=0.1)
    opt.telemetry.stream_to(tmp_path / "a.csv")
    opt.step()
    other = copied(opt)
    other.param_groups[0]["params"][0].grad = torch.ones(1)
    other.step()
    assert other.telemetry.history()["step"].tolist() == [1, 2]
    del other
    gc.collect()
    opt.step()
    opt.state_dict()
    assert steps_of(tmp_path / "a.csv") == [1, 2]


def test_an_optimizer_with_full_buffers_can_be_copied():
    telemetry = made(1500)
    again = pickle.loads(pickle.dumps(telemetry))
    write(again, 3)
    assert again.history()["step"].tolist() == list(range(1, 1504))
    assert telemetry.history()["step"].tolist() == list(range(1, 1501))


# the resume


def resumed(path, saved, *, load_first):
    """Return an optimizer that continues a run and its file."""
    x = torch.nn.Parameter(torch.zeros(1))
    x.grad = torch.ones(1)
    opt = fw.SGD([x], lr=0.1)
    if load_first:
        opt.load_state_dict(saved)
    opt.telemetry.stream_to(path)
    if not load_first:
        opt.load_state_dict(saved)
    return opt


@pytest.mark.parametrize("load_first", [True, False])
@pytest.mark.parametrize(("ahead", "expected"), [(0, [*range(1, 34)]), (4, [*range(1, 35), 31, 32, 33])])
def test_a_resumed_run_continues_its_file(tmp_path, load_first, ahead, expected):
    """Steps after the checkpoint are made again, and appended again."""
    path = tmp_path / "a.csv"
    opt = resumed(path, fw.SGD([torch.nn.Parameter(torch.zeros(1))]).state_dict(), load_first=True)
    for _ in range(30):
        opt.step()
    saved = copy.deepcopy(opt.state_dict())
    for _ in range(ahead):
        opt.step()
    del opt
    opt = resumed(path, saved, load_first=load_first)
    for _ in range(3):
        opt.step()
    opt.telemetry.stream_to(None)
    assert steps_of(path) == expected


@pytest.mark.parametrize("load_first", [True, False])
def test_a_file_that_ends_early_takes_the_loaded_rows(tmp_path, load_first):
    """An incomplete last line, which a killed process leaves, is written again."""
    path = tmp_path / "a.csv"
    saved = resumed(path, fw.SGD([torch.nn.Parameter(torch.zeros(1))]).state_dict(), load_first=True)
    for _ in range(30):
        saved.step()
    saved.telemetry.stream_to(None)
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"\r\n21.0,") + 9])
    resumed(path, saved.state_dict(), load_first=load_first).telemetry.stream_to(None)
    assert path.read_bytes() == whole


def test_a_run_that_goes_back_writes_the_steps_that_it_makes(tmp_path):
    """In one process, as after a divergence; rows before the load are not lost."""
    path = tmp_path / "a.csv"
    opt = resumed(path, fw.SGD([torch.nn.Parameter(torch.zeros(1))]).state_dict(), load_first=True)
    for _ in range(3):
        opt.step()
    saved = copy.deepcopy(opt.state_dict())
    for _ in range(2):
        opt.step()
    opt.load_state_dict(saved)
    opt.step()
    assert len(opt.telemetry) == 4
    assert steps_of(path) == [1, 2, 3, 4, 5, 4]


# errors of the file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a,b\n1,2\n",
            r"path must have the columns of a telemetry or be a new file, got '.*'\. It has the line 'a,b",
        ),
        (",".join(TELEMETRY) + "\nx,1\n1,2", r"path must end with a row of numbers"),
        (",".join(TELEMETRY), "path must have the columns of a telemetry"),
        (
            ",".join(TELEMETRY) + "\nx,1\n",
            r"path must end with a row of numbers, got '.*'\. It has the line 'x,1",
        ),
    ],
)
def test_a_foreign_file_is_refused(tmp_path, text, message):
    """And stays as it is, as does the stream."""
    path = tmp_path / "a.csv"
    path.write_text(text)
    telemetry = made(1)
    telemetry.stream_to(tmp_path / "b.csv")
    with pytest.raises(ValueError, match=rf"^Telemetry: {message}"):
        telemetry.stream_to(path)
    assert path.read_text() == text
    write(telemetry, 1)
    telemetry.stream_to(None)
    assert steps_of(tmp_path / "b.csv") == [1, 2]


def test_bad_paths(tmp_path):
    telemetry = made(1)
    with pytest.raises(TypeError, match=r"^Telemetry: path must be a path or None, got 3"):
        telemetry.stream_to(3)
    with pytest.raises(FileNotFoundError):
        telemetry.stream_to(tmp_path / "none" / "a.csv")
    with pytest.raises(RuntimeError, match=r"^Telemetry: stream_to\(\) needs .* telemetry=True, got False"):
        Telemetry(False).stream_to(tmp_path / "a.csv")
    assert not list(tmp_path.iterdir())
    Telemetry(False).stream_to(None)


def test_empty_files_and_files_without_rows_are_new(tmp_path):
    (tmp_path / "a.csv").touch()
    made().stream_to(tmp_path / "b.csv")
    for name in ("a.csv", "b.csv"):
        made(2).stream_to(tmp_path / name)
        gc.collect()
        assert steps_of(tmp_path / name) == [1, 2]


def test_a_full_disk_ends_the_stream_and_not_the_run():
    telemetry = made()
    telemetry.stream_to(os.devnull)
    full = Path("/dev/full").open("w")  # noqa: SIM115
    telemetry._stream.close()
    telemetry._stream._file, telemetry._stream._writer = full, csv.writer(full)
    with pytest.warns(UserWarning, match=r"^Telemetry: rows are no longer streamed to .*No space left"):
        write(telemetry, 1024)
    write(telemetry, 2048)
    assert len(telemetry) == 3072


@pytest.mark.parametrize("later", [0, 3, 1022, 1030])
def test_a_state_dict_holds_loaded_rows_and_later_ones(later):
    x = torch.nn.Parameter(torch.zeros(3))
    x.grad = torch.ones(3)
    saved = fw.SGD([x])
    for _ in range(5):
        saved.step()
    opt = fw.SGD([x])
    opt.load_state_dict(saved.state_dict())
    for _ in range(later):
        opt.step()
    rows = opt.state_dict()["fused_warmup"]["telemetry"]
    assert rows[:, 0].tolist() == list(range(max(1, later + 6 - 1024), later + 6))
    torch.testing.assert_close(rows, opt.telemetry.rows()[-1024:], rtol=0.0, atol=0.0, equal_nan=True)
