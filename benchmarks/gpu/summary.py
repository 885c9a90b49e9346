"""What follows from the rows: ratios of medians, and their means over the network."""

from collections.abc import Iterable, Sequence
from statistics import geometric_mean

from ..cases import shape_name
from . import features
from .contenders import OURS
from .layers import HOST_NAME, LAYERS
from .network import NETWORK, NetworkLayer, NetworkMean, network_mean, without_activation
from .rows import Measurement
from .training import TRAINING

LARGE = 100_000_000  # bytes of a tensor: far more than any cache
GROUPS = {"BN alone": without_activation(), "as in the network": NETWORK}


class Results:
    """Rows by what was measured. The last of several for the same thing counts."""

    def __init__(self, rows: Iterable[Measurement]) -> None:
        self.rows = list(rows)
        self._layers = {
            (row.name, row.shape, row.dtype, row.layout, row.direction, row.provider): row
            for row in self.rows
            if row.stage == LAYERS and row.median_us
        }

    def layer(
        self, layer: NetworkLayer, batch: int, dtype: str, layout: str, direction: str, provider: str
    ) -> Measurement | None:
        shape = shape_name((batch, layer.channels, layer.side, layer.side))
        return self._layers.get((layer.kind, shape, dtype, layout, direction, provider))

    def speed(self, group: str, other: str, batch: int, dtype: str, layout: str, direction: str) -> NetworkMean:
        """How many times faster than another provider ours is."""

        def ratio(layer: NetworkLayer) -> float | None:
            key = (layer, batch, dtype, layout, direction)
            return _ratio(self.layer(*key, other), self.layer(*key, OURS))

        return network_mean(GROUPS[group], ratio)

    def of_copy(self, group: str, batch: int, dtype: str, layout: str, direction: str) -> NetworkMean:
        def share(layer: NetworkLayer) -> float | None:
            found = self.layer(layer, batch, dtype, layout, direction, OURS)
            return found.of_copy if found else None

        return network_mean(GROUPS[group], share)

    def of_copy_when_large(self, direction: str) -> float | None:
        """Geometric mean of our shares of the copy bandwidth over all layers with large tensors."""
        return _mean(
            row.of_copy
            for row in self._layers.values()
            if row.provider == OURS and row.direction == direction and tensor_bytes(row) >= LARGE
        )

    def feature(self, name: str, direction: str) -> list[float]:
        """The times of a layer with an option over those of the plain layer, one for each shape."""
        times = {
            (row.shape, row.provider): row.median_us
            for row in self.rows
            if row.stage == features.FEATURES and row.direction == direction and row.median_us
        }
        shapes = dict.fromkeys(shape for shape, _ in times)
        both = [(times.get((shape, name)), times.get((shape, features.BASE))) for shape in shapes]
        return [with_option / plain for with_option, plain in both if with_option and plain]

    def step(self, provider: str, batch: int) -> Measurement | None:
        steps = [row for row in self.rows if row.stage == TRAINING and row.provider == provider and row.median_us]
        return next((row for row in steps if row.shape.startswith(f"{batch}x")), None)

    def step_speed(self, other: str, ours: str, batch: int) -> float | None:
        return _ratio(self.step(other, batch), self.step(ours, batch))

    def host_us(self) -> float | None:
        """The slower of the layers whose calls were timed on the host."""
        found = [row.median_us for row in self.rows if row.name == HOST_NAME and row.provider == OURS and row.median_us]
        return max(found, default=None)


def tensor_bytes(row: Measurement) -> int:
    sizes = [int(size) for size in row.shape.split("x")]
    elements = 1
    for size in sizes:
        elements *= size
    return elements * (4 if row.dtype == "float32" else 2)


def whole_mean(ratios: Sequence[float], wanted: int) -> float | None:
    """The geometric mean, unless some of the ratios are missing."""
    return geometric_mean(ratios) if len(ratios) == wanted else None


def _ratio(other: Measurement | None, ours: Measurement | None) -> float | None:
    return other.median_us / ours.median_us if other and ours and other.median_us and ours.median_us else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return geometric_mean(known) if known else None
