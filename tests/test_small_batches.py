"""The example of small and large batches: equal starts, the table, the picture, bad options."""

import re
import struct
from collections.abc import Iterator

import data
import pytest
import small_batches
import torch
from small_batches import GHOSTS, PLAIN, RENORM

import torch_bn

DIGITS = data.load("digits", None, seed=0).with_first(40)
TINY, LARGE = small_batches.contests()


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The example takes one thread; the tests after it must have theirs."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("contest", [*TINY, LARGE], ids=lambda contest: contest.batches)
def test_rivals_start_from_the_same_weights_and_see_the_same_images(contest):
    seen = []
    for rival in contest.rivals:
        training = small_batches.prepare(contest, rival, DIGITS, seed=3)
        weights = [parameter.detach().clone() for parameter in training.model.parameters()]
        labels = [batch.labels for batch in training.shuffled_batches()]
        seen.append((weights, labels))
    for first, second in zip(*seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("rival", "renorm", "size"), [(PLAIN, False, None), (RENORM, True, None), (GHOSTS, False, 32)])
def test_rivals_differ_in_their_layers(rival, renorm, size):
    training = small_batches.prepare(small_batches.contests()[1], rival, DIGITS, seed=0)
    layers = [layer for layer in training.model.modules() if isinstance(layer, torch_bn.BatchNorm2d)]
    assert layers and all((layer.renorm, layer.virtual_batch_size) == (renorm, size) for layer in layers)


def test_batches_of_one_class():
    _, one_class = small_batches.contests()[0]
    training = small_batches.prepare(one_class, PLAIN, DIGITS, seed=0)
    batches = [batch.labels for batch in training.shuffled_batches()]
    assert sorted(torch.cat(batches).tolist()) == sorted(DIGITS.train.labels.tolist())
    # Sorted by class and cut into fours: a batch with two classes lies where one class ends.
    assert sum(len(labels.unique()) > 1 for labels in batches) <= 9


def test_a_run_prints_its_table_and_draws_its_picture(tmp_path, capsys):
    arguments = ["--seeds", "1", "--epochs", "1", "--limit", "24", "--output", str(tmp_path)]
    assert small_batches.main(arguments) == 0
    printed = capsys.readouterr().out
    numbers = r"( +\d+\.\d{4}){5}$"
    for batches, rival in (
        ("4 images, mixed", PLAIN),
        ("4 images, mixed", RENORM),
        ("4 images of one class", PLAIN),
        ("4 images of one class", RENORM),
        ("512 images, mixed", PLAIN),
        ("512 images, mixed", GHOSTS),
    ):
        assert re.search(rf"^{batches} +{rival}{numbers}", printed, re.MULTILINE)
    picture = (tmp_path / "small_batches.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack_from(">II", picture, 16) == (1000, 400)
    assert str(tmp_path / "small_batches.png") in printed


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--epochs", "x"], ["--frames", "4"], ["--data", "cats"]])
def test_bad_options_end_with_one_line(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        small_batches.parse(arguments)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_missing_files_are_named(tmp_path, capsys):
    assert small_batches.main(["--data", "mnist", "--root", str(tmp_path), "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("small_batches.py: ")
