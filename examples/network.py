"""A small residual network for small images; it knows its normalization layers only through a factory."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

NormFactory = Callable[[int], nn.Module]  # number of channels -> layer for [N, channels, height, width]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al., Deep Residual Learning, 2015, arXiv:1512.03385, fig. 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: NormFactory) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = norm(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResidualNetwork(nn.Module):
    """Stem and three residual blocks of ``width``, 2 ``width`` and 4 ``width`` channels, each halving the image but the
    first, then the average over the image and a linear layer.

    Args:      channels: of the input images [N, channels, height, width], any height and width from 2 up.
               norm: builds each of the nine normalization layers from its number of channels.
    """

    def __init__(self, channels: int, classes: int, width: int = 32, norm: NormFactory = nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), norm(width), nn.ReLU())
        self.blocks = nn.Sequential(
            ResidualBlock(width, width, 1, norm),
            ResidualBlock(width, 2 * width, 2, norm),
            ResidualBlock(2 * width, 4 * width, 2, norm),
        )
        self.classify = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.blocks(self.stem(x)).mean(dim=(2, 3)))
