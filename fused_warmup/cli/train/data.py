"""Training data without downloads: the source text of Python's library and scikit-learn's digits."""

from __future__ import annotations

import math
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
    """Examples and their targets; the first dimensions are equal."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Data:
    """Data set of a model.

    Attributes:
        train: Examples for training.
        validation: Held-out examples.
        classes: Number of target classes.
        source: Origin of the data, one line.
    """

    train: Split
    validation: Split
    classes: int
    source: str


def load(model: str, dtype: torch.dtype = torch.float32) -> Data:
    """Load the data of a model.

    Args:
        model: ``"gpt"`` or ``"digits"``.
        dtype: Dtype of images.

    Returns:
        The data; the same at every call in one installation.

    Raises:
        ValueError: If the Python library is not installed as source files.
    """
    return text() if model == "gpt" else digits(dtype)


def text(root: Path | None = None, context: int = CONTEXT, limit: int = _TEXT_BYTES) -> Data:
    """Load windows of characters from the ``.py`` files of Python's library, sorted by name.

    Args:
        root: Folder of the files; None means the library of the running Python.
        context: Characters per window.
        limit: Number of characters after which no further file is read.

    Returns:
        Windows of ``context`` characters; the targets are the same windows shifted by one character. Every
        tenth file is for validation.

    Raises:
        ValueError: If there is too little text.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    train_files: list[str] = []
    validation_files: list[str] = []
    count = total = 0
    for path in sorted(root.glob("*.py")):
        # generated at build time, so its text differs between machines
        if path.name.startswith("_sysconfigdata"):
            continue
        source = path.read_text(encoding="utf-8", errors="replace").encode("ascii", "replace").decode()
        (validation_files if count % 10 == 9 else train_files).append(source)
        count += 1
        total += len(source)
        if total >= limit:
            break
    train, validation = "".join(train_files), "".join(validation_files)
    if min(len(train), len(validation)) < 10 * context:
        raise ValueError(f"train: {root} must hold the sources of Python's library, got {count} files.")
    characters = sorted(set(train + validation))
    index = {character: i for i, character in enumerate(characters)}
    tokens, held_out = (torch.tensor([index[c] for c in part]) for part in (train, validation))
    # windows are views, so the text is in memory once
    windows = tokens.unfold(0, context + 1, 1)
    checks = held_out.unfold(0, context + 1, context)
    checks = checks[:: math.ceil(len(checks) / _VALIDATION_WINDOWS)]
    return Data(
        Split(windows[:, :-1], windows[:, 1:]),
        Split(checks[:, :-1], checks[:, 1:]),
        len(characters),
        f"{total / 1e6:.1f} MB of Python's standard library, {count} files",
    )


def digits(dtype: torch.dtype = torch.float32) -> Data:
    """Load scikit-learn's 1,797 images of handwritten digits; every fifth one is for validation.

    Args:
        dtype: Dtype of the images, whose 17 grey levels bfloat16 has exactly.

    Returns:
        Images of shape ``[n, 1, 8, 8]`` in [0, 1] and int64 labels.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=dtype).unsqueeze(1) / 16
    labels = torch.tensor(raw.target, dtype=torch.int64)
    # neighbours in the file come from the same writer, so shuffle before the split
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, kept = order[::5], order[torch.arange(len(order)) % 5 != 0]
    return Data(
        Split(images[kept], labels[kept]),
        Split(images[held_out], labels[held_out]),
        10,
        f"scikit-learn's digits, {len(labels)} images",
    )
