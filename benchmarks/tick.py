"""Tick task of Sadrtdinov et al. 2024: classification with 16 features, each sufficient, and weights on a sphere.

Many models train at once as a batch of matrices, each with its own data, learning rate and order of the data.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

FEATURES, MARGIN = 16, 0.1 * math.sqrt(2)
PER_EPOCH = 32


def draw_features(y, generator):
    """Draw one feature per label, float32 of ``[n, 2]``, by rejection sampling from a square of side 4."""
    found = torch.empty(len(y), 2)
    todo = torch.arange(len(y))
    while len(todo):
        x = torch.rand(len(todo), 2, generator=generator) * 4 - 2
        roof, height = x[:, 0].abs(), x[:, 1]
        below = (roof - 2 + MARGIN <= height) & (height <= roof - MARGIN)
        above = (height >= roof + MARGIN) | (height <= roof - 2 - MARGIN)
        fits = torch.where(y[todo] == 1, above, below)
        found[todo[fits]] = x[fits]
        todo = todo[~fits]
    return found


def boundary_features(n, generator):
    """Draw features on the class boundary, which carry no information about the class."""
    first = torch.rand(n, generator=generator) * 4 - 2
    return torch.stack([first, first.abs() - 2.0 * torch.randint(2, (n,), generator=generator)], 1)


def draw(n, generator):
    """Draw inputs ``[n, 32]`` and labels 0 or 1 of ``[n]``."""
    y = torch.randint(2, (n,), generator=generator)
    return torch.cat([draw_features(y, generator) for _ in range(FEATURES)], 1), y.float()


def draw_single(k, n, generator):
    """Draw inputs and labels in the format of ``draw`` where only feature ``k`` depends on the class."""
    y = torch.randint(2, (n,), generator=generator)
    parts = [
        draw_features(y, generator) if i == k else boundary_features(n, generator) for i in range(FEATURES)
    ]
    return torch.cat(parts, 1), y.float()


class Batch:
    """Perceptrons 32-32-32-1, one for each pair of seed and rate; rates vary fastest.

    A layer norm follows each hidden layer, so the 2048 hidden weights, kept at norm 1, are scale-invariant; the last
    layer is frozen at norm 10.
    """

    def __init__(self, seeds, rates):
        starts, lasts, data, held_out = [], [], [], []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            data.append((*draw(512, generator), *draw(2000, generator)))
            starts.append(torch.randn(2, 32, 32, generator=generator))
            last = torch.randn(32, 1, generator=generator)
            lasts.append(10 * last / last.norm())
            # drawn last, so that the training data and initial weights of a seed do not depend on it
            held_out.append(draw(2000, generator))
        self.seeds, self.shape = list(seeds), (len(seeds), len(rates))

        def spread(tensors):
            return torch.stack(tensors).repeat_interleave(len(rates), 0)

        self.x, self.y, self.x_test, self.y_test = (spread(list(part)) for part in zip(*data, strict=True))
        self.x_held_out, self.y_held_out = (spread(list(part)) for part in zip(*held_out, strict=True))
        self.last = spread(lasts)
        self.weights = normalised(spread(starts))
        self.rates = torch.tensor(list(rates) * len(seeds))

    def logits(self, weights, x):
        """Return the logits ``[models, n]``."""
        h = x
        for layer in (weights[:, 0], weights[:, 1]):
            h = functional.layer_norm(h @ layer, (32,), eps=1e-7).relu()
        return (h @ self.last)[..., 0]

    def train(self, weights, rates, steps, seed, kept=()):
        """Train on batches of 16; return weights, mean losses ``[epochs, models]`` and the weights after the steps ``kept``."""
        generators = [torch.Generator().manual_seed(1000 * seed + own) for own in self.seeds]
        models = torch.arange(len(rates))[:, None]
        losses, total, found = [], 0.0, []
        for step in range(steps):
            if step % PER_EPOCH == 0:
                # one order per seed, independent of the other models of the batch
                orders = torch.stack([torch.randperm(512, generator=own) for own in generators])
                order = orders.repeat_interleave(self.shape[1], 0)
                x, y = self.x[models, order], self.y[models, order]
            rows = slice(step % PER_EPOCH * 16, step % PER_EPOCH * 16 + 16)
            weights.requires_grad_(True)
            z = self.logits(weights, x[:, rows])
            loss = functional.binary_cross_entropy_with_logits(z, y[:, rows], reduction="none").mean(1)
            (gradient,) = torch.autograd.grad(loss.sum(), weights)
            with torch.no_grad():
                weights = normalised(weights - rates[:, None, None, None] * gradient)
                total = total + loss
            if step % PER_EPOCH == PER_EPOCH - 1:
                losses.append(total / PER_EPOCH)
                total = 0.0
            if step + 1 in kept:
                found.append(weights)
        return weights.detach(), torch.stack(losses).detach(), found

    @torch.no_grad()
    def accuracy(self, weights, x=None, y=None):
        """Return the accuracy on the test data, or on the given data, of ``[seeds, rates]``."""
        x, y = (self.x_test, self.y_test) if x is None else (x, y)
        return ((self.logits(weights, x) > 0) == (y > 0.5)).float().mean(1).view(self.shape)

    def single_accuracies(self, weights):
        """Return the accuracy with each single feature, of ``[16, seeds, rates]``, on 1000 samples shared by all models."""
        generator = torch.Generator().manual_seed(0)
        found = []
        for k in range(FEATURES):
            x, y = draw_single(k, 1000, generator)
            found.append(self.accuracy(weights, x, y))
        return torch.stack(found)


def normalised(weights):
    """Scale weights ``[models, 2, 32, 32]`` to norm 1 over all layers of a model."""
    return weights / weights.flatten(1).norm(dim=1)[:, None, None, None]
