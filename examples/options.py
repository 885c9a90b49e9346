"""The options of train_cnn.py, and what other examples share of them; a bad value ends the program with one line."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import data
import torch


class Parser(argparse.ArgumentParser):
    """argparse without the page of usage in front of every error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def parse(description: str | None, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options given in ``arguments``, by default those of the process.

    Raises:    SystemExit with status 2 after one line on stderr if an option is unknown or out of range.
    """
    parser = Parser("train_cnn.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--norm", choices=("torch", "torch_bn"), default="torch_bn", help="normalization layers (default torch_bn)")
    add_data_options(parser)
    add("--batch-size", type=positive_int, default=64, metavar="N", help="images per step (default 64)")
    add("--epochs", type=positive_int, default=20, metavar="N", help="passes over the images (default 20)")
    add("--learning-rate", type=positive_float, default=0.1, metavar="X", help="its peak (default 0.1)")
    add("--width", type=positive_int, default=32, metavar="N", help="channels of the first block (default 32)")
    add("--seed", type=seed, default=0, metavar="N", help="of weights, split, order and augmentation (default 0)")
    add("--amp", action="store_true", help="mixed precision: bfloat16 where it is safe")
    add("--channels-last", action="store_true", help="channels_last memory format")
    add("--device", type=device, default=default_device(), help="cpu, cuda, cuda:1 ... (default %(default)s)")
    add("--threads", type=positive_int, metavar="N", help="CPU threads (default: torch's choice)")
    add("--resume", type=Path, metavar="PATH", help="go on from this checkpoint.pt")
    add("--output", type=Path, metavar="DIR", help="folder for the results (default runs/DATA-NORM)")
    chosen = parser.parse_args(arguments)
    chosen.output = chosen.output or Path("runs") / f"{chosen.data}-{chosen.norm}"
    return chosen


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Which images to train with: data, root and limit."""
    add = parser.add_argument
    add("--data", choices=data.NAMES, default="digits", help="images (default digits, which need no files)")
    add("--root", type=Path, metavar="DIR", help="folder with the official binary files of the other data sets")
    add("--limit", type=positive_int, metavar="N", help="train with the first N images only")


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up, got {text}")
    return int(text)


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf):
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text}")
    return value


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:  # what torch.manual_seed takes
        raise argparse.ArgumentTypeError(f"must be a whole number in [0, 2**63), got {text}")
    return int(text)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device(text: str) -> torch.device:
    try:
        chosen = torch.device(text)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch compiled without CUDA
        raise argparse.ArgumentTypeError(f"cannot use {text} ({str(error).splitlines()[0]})") from None
    if chosen.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text}")
    return chosen
