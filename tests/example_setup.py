"""What the tests of the examples share: a training of seconds, and small files in the official
formats."""

import gzip
import struct
from pathlib import Path

import numpy as np

# NB: torch 2.13's strided 1x1 convolution of fewer than 16 channels writes past its end on some batch sizes (oneDNN,
# channels_last, two threads).
QUICK = ["--limit", "200", "--epochs", "2", "--batch-size", "67", "--width", "16", "--device", "cpu"]


def write_cifar10(root: Path, images_per_file: int = 3) -> dict[str, np.ndarray]:
    """The official layout with few images; returns the records written, by file name."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    random = np.random.default_rng(5)
    written = {}
    for name in [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]:
        records = random.integers(0, 256, (images_per_file, 3073), np.uint8)
        records[:, 0] %= 10
        (folder / name).write_bytes(records.tobytes())
        written[name] = records
    return written


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_mnist(root: Path, packed: bool = False, train: int = 7, held_out: int = 3) -> dict[str, np.ndarray]:
    """The official four files with few images; returns the arrays written, by file name."""
    random = np.random.default_rng(6)
    written = {}
    for name, count in (("train", train), ("t10k", held_out)):
        written[f"{name}-images-idx3-ubyte"] = random.integers(0, 256, (count, 28, 28), np.uint8)
        written[f"{name}-labels-idx1-ubyte"] = random.integers(0, 10, count, np.uint8)
    for name, values in written.items():
        if packed:
            (root / f"{name}.gz").write_bytes(gzip.compress(idx(values)))
        else:
            (root / name).write_bytes(idx(values))
    return written
