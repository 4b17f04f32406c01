"""The two small models of ``fused-warmup train``: a character-level GPT and a convolutional network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .data import CONTEXT


class Block(nn.Module):
    """A pre-norm transformer block: attention and a perceptron with residual connections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream ``[batch, time, width]`` after this block."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = functional.gelu(self.up(self.norm2(x)))
        return x + torch.as_tensor(self.down(y))


class GPT(nn.Module):
    """A decoder-only transformer with learned positions.

    Args:
        vocabulary: Number of characters.
        context: Largest number of characters of a sequence.
        width: Width of the residual stream.
        heads: Attention heads per block.
        layers: Number of blocks.
    """

    def __init__(
        self, vocabulary: int, context: int = CONTEXT, width: int = 168, heads: int = 4, layers: int = 3
    ) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for name, param in self.named_parameters():
            if param.dim() > 1:
                # projections into the residual stream start smaller: their sum over layers has unit scale
                residual = name.endswith(("out.weight", "down.weight"))
                fan_in = width * (2 * layers if residual else 1)
                nn.init.normal_(param, std=fan_in**-0.5)
        # logits near 0, so that the first loss is the logarithm of the vocabulary size
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits ``[batch, time, vocabulary]`` for int64 tokens ``[batch, time]``."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(positions)
        return torch.as_tensor(self.head(self.norm(self.blocks(x))))


def digits_net(classes: int) -> nn.Module:
    """Build a convolutional network with batch norms for images of shape ``[n, 1, 8, 8]``."""

    def layer(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *layer(1, 32),
        *layer(32, 32),
        nn.MaxPool2d(2),
        *layer(32, 64),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, classes),
    )


def build(model: str, classes: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build a model; its weights are drawn from torch's default generator.

    Args:
        model: ``"gpt"`` or ``"digits"``.
        classes: Number of characters or of digits.
        dtype: Dtype of parameters and buffers; the weights are drawn in float32 and rounded to nearest.

    Returns:
        The model, in training mode.
    """
    return (GPT(classes) if model == "gpt" else digits_net(classes)).to(dtype)
