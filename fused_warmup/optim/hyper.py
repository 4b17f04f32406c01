"""Validate the hyper-parameters that several rules share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import _checks as check


def shared(owner: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters that every rule has."""
    return {
        "lr": check.number(owner, "lr", group["lr"]),
        "weight_decay": check.number(owner, "weight_decay", group["weight_decay"]),
        "maximize": check.flag(owner, "maximize", group["maximize"]),
    }


def averages(owner: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters of rules with two moments."""
    beta1, beta2 = check.betas(owner, group["betas"])
    eps = check.number(owner, "eps", group["eps"])
    return {**shared(owner, group), "beta1": beta1, "beta2": beta2, "eps": eps}


def moments(owner: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters of Adam-like rules with coupled or decoupled weight decay."""
    decoupled = check.flag(owner, "decoupled_weight_decay", group["decoupled_weight_decay"])
    return {**averages(owner, group), "decoupled": decoupled}


def projection(owner: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters of a projected update, whose weight decay is decoupled."""
    delta = check.number(owner, "delta", group["delta"])
    wd_ratio = check.number(owner, "wd_ratio", group["wd_ratio"])
    nesterov = check.flag(owner, "nesterov", group["nesterov"])
    return {"delta": delta, "wd_ratio": wd_ratio, "nesterov": nesterov, "decoupled": True}
