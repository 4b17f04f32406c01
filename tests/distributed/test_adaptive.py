"""AutoWU and searches over two processes that do not decide on the same thing."""

import pytest
from ranks import run_ranks

pytestmark = pytest.mark.slow

START = """
from datetime import timedelta

from fused_warmup.distributed import agreement

agreement.TIMEOUT = timedelta(seconds=3)

def feed(wu, count):
    for i in range(count):
        wu.step(float(i))

def message(of, kind):
    try:
        of()
    except kind as error:
        return str(error)

def show(told):
    print(told.replace(" ", "_"))
"""
DIFFERENT = """
wu = fw.AutoWU(400, 10)
feed(wu, 20)
print(len(wu.tests))

other = fw.AutoWU(400, 5 + 5 * rank)
show(message(lambda: feed(other, 10), ValueError))
feed(fw.AutoWU(400, 5 + 5 * rank, reduce=False), 10)

behind = fw.AutoWU(400, 10)
if rank == 1:
    behind.load_state_dict(wu.state_dict())
show(message(lambda: feed(behind, 10), ValueError))
# the epoch of the error is lost, and its tests are not
feed(wu, 10)
print(len(wu.tests), wu.tests[-1].step)

model = torch.nn.Linear(3, 1 + rank)
opt = fw.SGD(model.parameters(), lr=0.1)
def loss_fn():
    return model(torch.ones(2, 3)).square().mean()
loss_fn().backward()
show(message(lambda: fw.tuning.initial_lr(loss_fn, opt, target=10.0), ValueError))
catapult = fw.PersistentCatapult(opt, 10.0 + rank)
show(message(lambda: catapult.step(loss_fn(), loss_fn), ValueError))
print(fw.tuning.initial_lr(loss_fn, opt, target=10.0, reduce=False).forwards > 0)
if rank == 0:
    show(message(lambda: fw.tuning.initial_lr(loss_fn, opt, target=10.0), RuntimeError))
total = torch.ones(1)
dist.all_reduce(total)
print(total.item())
dist.destroy_process_group()
"""
ONE = """
# the other rank is inside of a collective of the default group meanwhile
if rank == 0:
    show(message(lambda: feed(fw.AutoWU(400, 10), 10), RuntimeError))
total = torch.ones(7)
dist.all_reduce(total)
print(total.sum().item())
dist.destroy_process_group()
"""


def test_ranks_that_differ_are_told_the_difference(tmp_path):
    hint = "Record the losses on all ranks; independent trainings need reduce=False."
    alone = "Pass reduce=False to measure the loss of one rank."
    same = "must be the same on all ranks, got"
    told = [
        "2",
        f"AutoWU: steps_per_epoch {same} 5 on rank 0 and 10 on rank 1. {hint}",
        f"AutoWU: recorded losses {same} 10 on rank 0 and 30 on rank 1. {hint}",
        *("3", "30"),
        f"initial_lr: elements of params {same} 4 on rank 0 and 8 on rank 1. {alone}",
        f"PersistentCatapult: target {same} 10.0 on rank 0 and 11.0 on rank 1. {alone}",
        "True",
    ]
    missing = (
        "initial_lr: all 2 ranks must make this call, each of them equally often; another rank has not made it "
        f"within 3 s. {alone}"
    )
    first, second = run_ranks(tmp_path, START + DIFFERENT)
    assert first == [word.replace(" ", "_") for word in (*told, missing, "2.0")]
    assert second == [word.replace(" ", "_") for word in (*told, "2.0")]


def test_losses_of_one_rank_are_an_error_there(tmp_path):
    """The process must survive, and the default group with it."""
    first, second = run_ranks(tmp_path, START + ONE)
    assert first == [
        "AutoWU: all 2 ranks must make this call, each of them equally often; another rank has not made it "
        "within 3 s. Record the losses on all ranks; independent trainings need reduce=False.".replace(
            " ", "_"
        ),
        "14.0",
    ]
    assert second == ["14.0"]
