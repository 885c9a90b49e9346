"""Image classification data: scikit-learn's digits, or CIFAR-10, MNIST and Fashion-MNIST from their official files."""

import gzip
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

CLASSES = 10  # each of the data sets below has ten
DIGITS_HELD_OUT = 360  # of 1797


class DataError(Exception):
    """Data that is missing or damaged; the message is one sentence for the user."""


@dataclass(frozen=True)
class Images:
    """Images, uint8 [N, channels, height, width], and their labels, int64 [N] in [0, 10)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> "Images":
        return Images(self.pixels[:count], self.labels[:count])

    def at(self, index: Tensor) -> "Images":
        return Images(self.pixels[index], self.labels[index])

    def to(self, device: torch.device) -> "Images":
        return Images(self.pixels.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """Images to train with, images held out to judge by, and how far an image may be shifted or mirrored."""

    train: Images
    held_out: Images
    shift: int  # pixels in each direction
    mirror: bool  # left to right

    @property
    def channels(self) -> int:
        return self.train.pixels.shape[1]

    def with_first(self, count: int | None) -> "Dataset":
        """The same, with the first ``count`` images to train with; None keeps all."""
        return self if count is None else replace(self, train=self.train.first(count))


def load(name: str, root: Path | None, seed: int) -> Dataset:
    """The data set called ``name``, a key of :data:`NAMES`.

    Args:      root: folder of the official files; not used for digits.
               seed: chooses which digits are held out; the other sets come with a test set.
    Raises:    DataError if a file is missing or damaged.
    """
    if name == "digits":
        return _digits(seed)
    if root is None:
        raise DataError(f"--data {name} needs --root DIR, the folder with its files")
    if name == "cifar10":
        return _cifar10(root)
    return _mnist(root, source=MNIST_SOURCES[name], mirror=name == "fashion-mnist")


MNIST_SOURCES = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "fashion-mnist": "https://github.com/zalandoresearch/fashion-mnist",
}
CIFAR10_SOURCE = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
NAMES = ("digits", "cifar10", *MNIST_SOURCES)


def augment(pixels: Tensor, shift: int, mirror: bool) -> Tensor:
    """Each image of ``pixels`` [N, C, H, W] shifted by up to ``shift`` pixels, zeros moving in, and perhaps mirrored.

    The random numbers come from the CPU's generator on every device, so that a seed means the same images everywhere.
    """
    count, _, height, width = pixels.shape
    offsets = torch.randint(2 * shift + 1, (2, count, 1))
    rows = offsets[0] + torch.arange(height)
    columns = offsets[1] + torch.arange(width)
    if mirror:
        columns = torch.where(torch.rand(count, 1) < 0.5, columns, columns.flip(1))
    rows, columns = rows.to(pixels.device), columns.to(pixels.device)
    image = torch.arange(count, device=pixels.device)
    padded = F.pad(pixels, [shift] * 4)
    return padded.movedim(1, 3)[image[:, None, None], rows[:, :, None], columns[:, None, :]].movedim(3, 1)


def _digits(seed: int) -> Dataset:
    bunch = load_digits()
    # The scans hold 0 ... 16; all sets are 0 ... 255 from here on.
    pixels = torch.from_numpy((bunch.images * (255 / 16)).round().astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out, train = order[:DIGITS_HELD_OUT], order[DIGITS_HELD_OUT:]
    return Dataset(
        Images(pixels[train], labels[train]), Images(pixels[held_out], labels[held_out]), shift=1, mirror=False
    )


def _cifar10(root: Path) -> Dataset:
    folder = root / "cifar-10-batches-bin"
    batches = [_cifar10_file(folder / f"data_batch_{number}.bin") for number in range(1, 6)]
    train = Images(torch.cat([batch.pixels for batch in batches]), torch.cat([batch.labels for batch in batches]))
    return Dataset(train, _cifar10_file(folder / "test_batch.bin"), shift=4, mirror=True)


def _cifar10_file(path: Path) -> Images:
    # https://www.cs.toronto.edu/~kriz/cifar.html: per image one byte of label, then 32 x 32 red, green and blue bytes
    record = 1 + 3 * 32 * 32
    content = _read(path, CIFAR10_SOURCE)
    if len(content) == 0 or len(content) % record:
        raise DataError(f"{path}: damaged, expected a positive multiple of {record} bytes, got {len(content)}")
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    pixels = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy())
    return Images(pixels, _labels(path, records[:, 0]))


def _mnist(root: Path, source: str, mirror: bool) -> Dataset:
    def part(name: str) -> Images:
        pixels_path, labels_path = root / f"{name}-images-idx3-ubyte", root / f"{name}-labels-idx1-ubyte"
        pixels = _idx_file(pixels_path, source, dimensions=3)
        labels = _labels(labels_path, _idx_file(labels_path, source, dimensions=1))
        if pixels.shape[1:] != (28, 28):
            raise DataError(f"{pixels_path}: damaged, expected images of 28 x 28 pixels, got {list(pixels.shape[1:])}")
        if len(pixels) != len(labels):
            raise DataError(f"{labels_path}: damaged, expected {len(pixels)} labels, one per image, got {len(labels)}")
        return Images(torch.from_numpy(pixels).unsqueeze(1), labels)

    return Dataset(part("train"), part("t10k"), shift=2, mirror=mirror)


def _idx_file(path: Path, source: str, dimensions: int) -> np.ndarray:
    # https://yann.lecun.com/exdb/mnist: magic 0, 0, 8 (unsigned bytes), dimensions; each size big-endian; the bytes
    content = _read(path, source)
    header = 4 + 4 * dimensions
    magic = bytes([0, 0, 8, dimensions])
    if content[:4] != magic:
        raise DataError(f"{path}: damaged, expected the magic number {magic.hex()}, got {content[:4].hex() or 'none'}")
    if len(content) < header:
        raise DataError(f"{path}: damaged, expected a header of {header} bytes, got {len(content)} bytes in all")
    sizes = struct.unpack_from(f">{dimensions}I", content, 4)
    expected = header + int(np.prod(sizes, dtype=object))  # object: Python integers, which cannot overflow
    if len(content) != expected or sizes[0] == 0:
        raise DataError(f"{path}: damaged, expected {expected} bytes for {list(sizes)} values, got {len(content)}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(sizes).copy()


def _labels(path: Path, values: np.ndarray) -> Tensor:
    if values.max() >= CLASSES:
        raise DataError(f"{path}: damaged, expected labels in [0, {CLASSES}), got {values.max()}")
    return torch.from_numpy(values.astype(np.int64))


def _read(path: Path, source: str) -> bytes:
    """The bytes of ``path``, or those packed in ``path`` + ``.gz``."""
    packed = path.with_name(path.name + ".gz")
    try:
        if path.is_file() or not packed.is_file():
            return path.read_bytes()
        return gzip.decompress(packed.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: missing, plain and as .gz; it can be downloaded from {source}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{packed}: damaged, it cannot be unpacked ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
