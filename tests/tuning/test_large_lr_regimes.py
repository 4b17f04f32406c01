"""Large rates: regimes and windows of known trials, the protocol with rates in any order, and means of states."""

import pytest
import torch
from torch.nn import Parameter

import fused_warmup as fw
from fused_warmup.tuning import Trial

# accuracies of the last epoch count, tuned ones where they are higher; one epoch alone cannot diverge
TRIALS = {
    0.1: Trial((1.0, 1e-3), (0.9, 0.6), tuned=0.7),
    0.2: Trial((0.5,), (0.5,), tuned=0.7),
    0.3: Trial((1.0, 0.4) + (0.5, 0.7) * 9, (0.5,), tuned=0.8, barrier=0.01),
    0.4: Trial((1.0, 0.5), (0.5,), tuned=0.75),
    0.5: Trial((1.0, 0.5), (0.5,), tuned=0.69),
    0.6: Trial((1.0, 0.5), (0.5,), tuned=0.8, barrier=0.02),
    0.7: Trial((1.0, 1.5), (0.5,), tuned=0.8),
}


def test_what_makes_the_best_rate():
    """As accurate as regime 1 is enough; the most accurate is the best, not the largest."""
    found = fw.tuning.find_regimes(TRIALS.__getitem__, TRIALS, max_runs=0)
    assert [p.regime for p in found.points] == ["1", "2A", "2A", "2A", "2B", "2B", "3"]
    assert (found.divergence, found.best, found.window) == (0.7, 0.3, (0.2, 0.4))
    assert (found.points[2].loss, found.points[2].spread) == pytest.approx((0.6, 0.1))


def test_a_bit_above_chance_is_chance():
    """One and a half times it for ten classes."""
    trials = {0.1: 0.9, 0.2: 0.2, 0.3: 0.14, 0.4: 0.16}
    found = fw.tuning.find_regimes(
        lambda lr: Trial((1.0, 1e-3 if lr == 0.1 else 0.5), (trials[lr],)), trials, chance=0.1, max_runs=0
    )
    assert found.divergence == 0.3


def test_the_window_ends_where_training_diverges():
    untuned = {lr: Trial(trial.losses) for lr, trial in TRIALS.items() if lr not in (0.3, 0.4, 0.5, 0.6)}
    found = fw.tuning.find_regimes(
        {**untuned, 0.3: Trial((1.0, 2.0))}.__getitem__, [*untuned, 0.3], max_runs=0
    )
    assert (found.divergence, found.window) == (0.3, (0.2, 0.3))


def test_a_protocol_of_rates_in_any_order():
    """The barrier is between the lowest and the highest; what came before tuning is no result of it."""
    x = Parameter(torch.tensor([10.0], dtype=torch.float64))
    model = torch.nn.ParameterList([x])

    def run_epoch(optimizer):
        x.grad = torch.ones_like(x)
        optimizer.step()
        return float(x.detach())

    found = fw.tuning.pretrain_finetune(
        model, lambda lr: fw.SGD([x], lr=lr), run_epoch, lambda: float(x.detach()), lr=1.0, epochs=2,
        finetune_lrs=(0.5, 0.1, 1.0), finetune_epochs=1, average=0,
        error=lambda: 1.0 - abs(float(x.detach()) - 7.5),
    )  # fmt: skip
    # from 7.9 to 7 over a top at 7.5; the place next to it is 7.495
    assert found.barrier == pytest.approx(0.995 - 0.555)
    assert found.best == "pretrained"
    assert found.trial.tuned == pytest.approx(7.9)


def test_means_of_states_are_of_doubles_and_of_their_own_memory():
    states = [{"x": torch.tensor([value]), "n": torch.tensor(value > 0.0)} for value in (1e8, 1.0, -1e8)]
    mean = fw.tuning.average_states(states)
    assert mean["x"] == torch.tensor([1.0 / 3.0])
    mean["n"].fill_(True)
    assert not states[-1]["n"]
