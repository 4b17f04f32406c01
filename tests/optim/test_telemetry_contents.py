"""What the record of the steps holds: rows after a load, losses of closures, and memory on the parameters' device."""

import pytest
import torch
from torch.nn import Parameter

import fused_warmup as fw
from fused_warmup.optim.telemetry import Telemetry
from fused_warmup.tuning.autowu.loss_buffer import LossBuffer


@pytest.mark.parametrize("unread", [1025, 2500])
def test_loading_drops_rows_that_nobody_has_read(unread):
    """Full pages that were copied aside do not come back after a load, and later pages are whole."""
    x, y = Parameter(torch.zeros(1)), Parameter(torch.zeros(1))
    short, long = fw.SGD([x], lr=0.1), fw.SGD([y], lr=0.1)
    x.grad = y.grad = torch.zeros(1)
    for _ in range(3):
        short.step()
    for _ in range(unread):
        long.step()
    long.load_state_dict(short.state_dict())
    assert long.telemetry.history()["step"].tolist() == [1, 2, 3]
    for _ in range(1500):
        long.step()
    assert long.telemetry.history()["step"].tolist() == list(range(1, 1504))


def test_a_loss_that_a_closure_returns_as_a_number_is_recorded():
    param = Parameter(torch.zeros(1))
    opt = fw.SGD([param], lr=1.0)
    param.grad = torch.zeros(1)
    assert opt.step(lambda: 2.5) == 2.5
    assert opt.telemetry.latest()["loss"] == 2.5


def test_what_is_kept_on_a_device_follows_the_parameters():
    """Of which there is another one on every machine, though nothing can be read there."""
    cpu, meta = torch.device("cpu"), torch.device("meta")
    telemetry, losses = Telemetry(), LossBuffer(3)
    for device in (cpu, meta):
        telemetry.allocate(device)
        losses.add(1.0, device)
        assert (
            telemetry.pending_scalars.device == telemetry.ring_buffer.device == losses.values.device == device
        )
