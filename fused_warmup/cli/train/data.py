"""Data that any machine has: the text of Python's own library, and scikit-learn's digits."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CONTEXT = 32
_TEXT_BYTES = 3_000_000
_VALIDATION_WINDOWS = 512


@dataclass(frozen=True)
class Split:
    """Examples with their targets, both with the same first dimension."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Data:
    """What a model trains on.

    Attributes:
        train: Examples to draw batches from.
        validation: Examples that no batch holds.
        classes: Number of classes of a target.
        source: One line about the origin.
    """

    train: Split
    validation: Split
    classes: int
    source: str


def load(model: str) -> Data:
    """Return the data of a model.

    Args:
        model: ``"gpt"`` or ``"digits"``.

    Returns:
        The same data at every call in one installation.

    Raises:
        ValueError: If the Python library is not there as source files.
    """
    return text() if model == "gpt" else digits()


def text(root: Path | None = None, context: int = CONTEXT, limit: int = _TEXT_BYTES) -> Data:
    """Return windows of characters from the ``.py`` files of Python's library, in order of their names.

    Args:
        root: Folder of the files; None takes the library of the running Python.
        context: Characters that the model sees.
        limit: Number of characters after which no further file is read.

    Returns:
        Windows of ``context`` characters, with the same windows one character later as targets; every tenth
        file is for validation.

    Raises:
        ValueError: If there is too little text.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    parts: tuple[list[str], list[str]] = ([], [])
    count = total = 0
    for path in sorted(root.glob("*.py")):
        # generated at build time: another text on every machine
        if path.name.startswith("_sysconfigdata"):
            continue
        source = path.read_text(encoding="utf-8", errors="replace").encode("ascii", "replace").decode()
        parts[count % 10 == 9].append(source)
        count, total = count + 1, total + len(source)
        if total >= limit:
            break
    train, validation = ("".join(part) for part in parts)
    if min(len(train), len(validation)) < 10 * context:
        raise ValueError(f"train: {root} must hold the sources of Python's library, got {count} files.")
    characters = sorted(set(train + validation))
    index = {character: i for i, character in enumerate(characters)}
    tokens, held_out = (torch.tensor([index[c] for c in part]) for part in (train, validation))
    # windows are views: the text is in memory once
    windows = tokens.unfold(0, context + 1, 1)
    checks = held_out.unfold(0, context + 1, context)
    checks = checks[:: -(-len(checks) // _VALIDATION_WINDOWS)]
    return Data(
        Split(windows[:, :-1], windows[:, 1:]),
        Split(checks[:, :-1], checks[:, 1:]),
        len(characters),
        f"{total / 1e6:.1f} MB of Python's standard library, {count} files",
    )


def digits() -> Data:
    """Return scikit-learn's 1,797 images of handwritten digits, every fifth one for validation.

    Returns:
        Float32 images of shape ``[n, 1, 8, 8]`` in [0, 1] and int64 labels.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(raw.target, dtype=torch.int64)
    # neighbours in the file come from the same writer; a shuffle mixes the writers
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, kept = order[::5], order[torch.arange(len(order)) % 5 != 0]
    return Data(
        Split(images[kept], labels[kept]),
        Split(images[held_out], labels[held_out]),
        10,
        f"scikit-learn's digits, {len(labels)} images",
    )
