"""The data sets of the training example: reading, refusing damaged files, augmenting."""

import re

import data
import numpy as np
import pytest
import torch
from example_setup import idx, write_cifar10, write_mnist


def test_digits_are_split_by_the_seed():
    first, again, other = (data.load("digits", None, seed) for seed in (3, 3, 4))
    assert len(first.train) + len(first.held_out) == 1797
    assert first.train.pixels.shape[1:] == (1, 8, 8)
    assert torch.equal(first.held_out.pixels, again.held_out.pixels)
    assert not torch.equal(first.held_out.pixels, other.held_out.pixels)
    assert first.train.pixels.max() == 255
    assert sorted(first.train.labels.unique().tolist()) == list(range(10))


def test_cifar10_reads_what_the_files_hold(tmp_path):
    written = write_cifar10(tmp_path)
    dataset = data.load("cifar10", tmp_path, seed=0)
    assert dataset.train.pixels.shape == (15, 3, 32, 32)
    record = written["data_batch_4.bin"][1]  # image 3 * 3 + 1
    assert dataset.train.labels[10] == record[0]
    assert dataset.train.pixels[10, 2, 5, 31] == record[1 + 2 * 1024 + 5 * 32 + 31]
    assert dataset.held_out.labels.tolist() == written["test_batch.bin"][:, 0].tolist()


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_mnist_reads_what_the_files_hold(tmp_path, name, packed):
    written = write_mnist(tmp_path, packed)
    dataset = data.load(name, tmp_path, seed=0)
    assert dataset.train.pixels.squeeze(1).tolist() == written["train-images-idx3-ubyte"].tolist()
    assert dataset.train.labels.tolist() == written["train-labels-idx1-ubyte"].tolist()
    assert dataset.held_out.pixels.squeeze(1).tolist() == written["t10k-images-idx3-ubyte"].tolist()
    assert dataset.held_out.labels.tolist() == written["t10k-labels-idx1-ubyte"].tolist()


@pytest.mark.parametrize(
    ("name", "file", "source"),
    [
        ("cifar10", "cifar-10-batches-bin/data_batch_1.bin", "https://www.cs.toronto.edu"),
        ("mnist", "train-images-idx3-ubyte", "https://ossci-datasets"),
        ("fashion-mnist", "train-images-idx3-ubyte", "https://github.com/zalandoresearch"),
    ],
)
def test_missing_file_is_named_with_its_source(tmp_path, name, file, source):
    with pytest.raises(data.DataError, match=f"^{re.escape(str(tmp_path / file))}: missing.*{source}"):
        data.load(name, tmp_path, seed=0)


def test_root_is_asked_for():
    with pytest.raises(data.DataError, match="--data mnist needs --root DIR"):
        data.load("mnist", None, seed=0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "expected a positive multiple of 3073 bytes, got 9218"),
        (lambda content: b"", "expected a positive multiple of 3073 bytes, got 0"),
        (lambda content: b"\x0a" + content[1:], r"expected labels in \[0, 10\), got 10"),
    ],
    ids=["cut", "empty", "label"],
)
def test_damaged_cifar10_is_refused(tmp_path, damage, message):
    write_cifar10(tmp_path)
    file = tmp_path / "cifar-10-batches-bin" / "data_batch_5.bin"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(data.DataError, match=f"data_batch_5.bin: damaged, {message}"):
        data.load("cifar10", tmp_path, seed=0)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("train-images-idx3-ubyte", lambda c: b"\x00\x00\x08\x01" + c[4:], "magic number 00000803, got 00000801"),
        ("train-images-idx3-ubyte", lambda c: b"", "magic number 00000803, got none"),
        ("train-images-idx3-ubyte", lambda c: c[:9], "a header of 16 bytes, got 9 bytes in all"),
        ("train-images-idx3-ubyte", lambda c: c[:-1], r"expected 5504 bytes for \[7, 28, 28\] values, got 5503"),
        ("train-images-idx3-ubyte", lambda c: c + b"\0", r"expected 5504 bytes for \[7, 28, 28\] values, got 5505"),
        ("train-images-idx3-ubyte", lambda c: c[:4] + b"\xff" * 12, "bytes for .4294967295, 4294967295, 4294967295"),
        ("train-images-idx3-ubyte", lambda c: idx(np.zeros((7, 27, 28), np.uint8)), r"28 x 28 pixels, got \[27, 28\]"),
        ("train-images-idx3-ubyte", lambda c: idx(np.zeros((0, 28, 28), np.uint8)), r"for \[0, 28, 28\] values"),
        ("train-labels-idx1-ubyte", lambda c: c[:-1] + b"\x0b", r"expected labels in \[0, 10\), got 11"),
        ("train-labels-idx1-ubyte", lambda c: idx(np.zeros(6, np.uint8)), "expected 7 labels, one per image, got 6"),
        ("t10k-labels-idx1-ubyte", lambda c: c[:-1], r"expected 11 bytes for \[3\] values, got 10"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_damaged_mnist_is_refused(tmp_path, file, damage, message):
    write_mnist(tmp_path)
    (tmp_path / file).write_bytes(damage((tmp_path / file).read_bytes()))
    with pytest.raises(data.DataError, match=f"{file}: damaged, .*{message}"):
        data.load("mnist", tmp_path, seed=0)


@pytest.mark.parametrize(
    "damage",
    [lambda c: c[:-9], lambda c: b"no gzip", lambda c: c[:60] + bytes([c[60] ^ 255]) + c[61:]],
    ids=["cut", "foreign", "flipped"],
)
def test_damaged_gz_is_refused(tmp_path, damage):
    write_mnist(tmp_path, packed=True)
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(data.DataError, match=r"t10k-images-idx3-ubyte\.gz: damaged, it cannot be unpacked"):
        data.load("mnist", tmp_path, seed=0)


@pytest.mark.parametrize("mirror", [False, True], ids=["shifted", "shifted and mirrored"])
def test_augment_shifts_within_its_bound(mirror):
    images, size = 300, 7
    pixels = torch.zeros(images, 2, size, size + 2, dtype=torch.uint8)
    pixels[:, 0, 3, 2] = 1  # one dot in the first channel, off the middle column 4
    pixels[:, 1] = 9
    moved = data.augment(pixels, shift=2, mirror=mirror)
    assert moved.shape == pixels.shape and moved.dtype == torch.uint8
    image, row, column = moved[:, 0].nonzero().T
    assert image.tolist() == list(range(images)), "each dot stays inside, once"
    assert row.unique().tolist() == [1, 2, 3, 4, 5]
    assert column.unique().tolist() == ([0, 1, 2, 3, 4, 5, 6, 7, 8] if mirror else [0, 1, 2, 3, 4])
    assert (moved[:, 1] == 0).any() and (moved[:, 1] <= 9).all(), "zeros move in"
