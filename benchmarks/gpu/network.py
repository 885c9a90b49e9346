"""The 53 batch norms of ResNet-50 at 224x224: what follows each, and how often a shape occurs."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log

PLAIN, RELU, ADD_RELU = "BN", "BN+ReLU", "BN+add+ReLU"


@dataclass(frozen=True)
class NetworkLayer:
    """`count` equal layers."""

    kind: str
    channels: int
    side: int
    count: int


# As torchvision's model has them, stride in the 3x3 convolutions: the first two of a bottleneck are followed by ReLU,
# the third by the addition and ReLU, that of a shortcut by nothing.
NETWORK = [
    NetworkLayer(RELU, 64, 112, 1), NetworkLayer(RELU, 64, 56, 6), NetworkLayer(ADD_RELU, 256, 56, 3),
    NetworkLayer(PLAIN, 256, 56, 1), NetworkLayer(RELU, 128, 56, 1), NetworkLayer(RELU, 128, 28, 7),
    NetworkLayer(ADD_RELU, 512, 28, 4), NetworkLayer(PLAIN, 512, 28, 1), NetworkLayer(RELU, 256, 28, 1),
    NetworkLayer(RELU, 256, 14, 11), NetworkLayer(ADD_RELU, 1024, 14, 6), NetworkLayer(PLAIN, 1024, 14, 1),
    NetworkLayer(RELU, 512, 14, 1), NetworkLayer(RELU, 512, 7, 5), NetworkLayer(ADD_RELU, 2048, 7, 3),
    NetworkLayer(PLAIN, 2048, 7, 1),
]  # fmt: skip


def without_activation() -> list[NetworkLayer]:
    """The same 53 layers, taken as the batch norm alone."""
    counts: Counter[tuple[int, int]] = Counter()
    for layer in NETWORK:
        counts[layer.channels, layer.side] += layer.count
    return [NetworkLayer(PLAIN, channels, side, count) for (channels, side), count in counts.items()]


@dataclass(frozen=True)
class NetworkMean:
    """A geometric mean over layers, each shape as often as the network has it; `covered` counts those measured."""

    value: float | None
    covered: int
    total: int

    @property
    def whole(self) -> float | None:
        """The mean, unless a layer is missing in it."""
        return self.value if self.covered == self.total else None


def network_mean(layers: list[NetworkLayer], value: Callable[[NetworkLayer], float | None]) -> NetworkMean:
    known = [(layer.count, found) for layer in layers if (found := value(layer))]
    covered = sum(count for count, _ in known)
    mean = exp(sum(count * log(found) for count, found in known) / covered) if covered else None
    return NetworkMean(mean, covered, sum(layer.count for layer in layers))
