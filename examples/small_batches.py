"""Shows what renorm and ghost batches change: trains the network of train_cnn.py with and without them, several times.

python examples/small_batches.py
python examples/small_batches.py --quick
python examples/small_batches.py --data cifar10 --root DIR --limit 2000

(a) batches of 4 images, plain against renorm: the images mixed, and four of one class together, like frames of a film
(b) batches of 512 images, plain against ghost batches of 32

Prints a table of the results and writes small_batches.png, their curves, into the folder --output. The two rivals of a
seed start from the same weights and see the same images in the same order. docs/small_batches.md explains the picture.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean

import data
import options
import report
import torch
from network import ResidualNetwork
from tqdm import tqdm
from train_cnn import INTERRUPTED, torch_bn
from training import DivergedError, Settings, Training

WIDTH = 16  # channels of the first block: half of train_cnn.py's, which have no better results on the digits
PLAIN, RENORM, GHOSTS = "plain", "renorm", "ghost batches"
COLORS = {PLAIN: "C0", RENORM: "C1", GHOSTS: "C2"}
PAPER_STEPS = 80_000  # schedules.paper() has reached its last bounds after half of so many steps
HEADER = """\
                                            held-out accuracy        held-out   training
batches                    layers            mean  worst    best         loss       loss"""


class OneClassTraining(Training):
    """Training whose batches are of one class each, in a new order every epoch; where two classes meet, of both."""

    def shuffled_batches(self) -> Iterator[data.Images]:
        order = torch.randperm(len(self.train_images)).to(self.device)
        by_class = order[self.train_images.labels[order].argsort(stable=True)]
        batches = by_class.split(self.settings.batch_size)
        for number in torch.randperm(len(batches)).tolist():
            yield self.train_images.at(batches[number])


@dataclass(frozen=True)
class Contest:
    """Trainings that differ in their normalization layers alone."""

    batches: str  # what they are, in words
    rivals: tuple[str, str]
    settings: Settings
    momentum: float  # of the running statistics, for each rival the same
    augmented: bool
    kind: type[Training] = Training
    line: str = "-"  # in the picture


Runs = dict[tuple[Contest, str], list[Sequence[report.Row]]]  # of each rival: one history per seed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    chosen = parse(arguments)
    torch.set_num_threads(chosen.threads)
    tiny, large = contests(chosen.epochs)
    path = chosen.output / "small_batches.png"
    try:
        chosen.output.mkdir(parents=True, exist_ok=True)
        runs: Runs = {}
        print(HEADER)
        for contest in (*tiny, large):
            runs |= run(contest, chosen)
            for rival in contest.rivals:
                print(table_line(contest, rival, runs), flush=True)
        report.write_bands(path, {"(a) batches of 4": bands(tiny, runs), "(b) batches of 512": bands([large], runs)})
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (data.DataError, DivergedError, OSError) as error:
        print(f"small_batches.py: {error}", file=sys.stderr)
        return 1
    print(f"\nMeans over {chosen.seeds} seeds. Held-out loss, epoch by epoch: {path.resolve()}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Raises SystemExit with status 2 after one line on stderr if an option is unknown or out of range."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = options.Parser("small_batches.py", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--seeds", type=options.positive_int, metavar="N", help="trainings of each kind (default 3)")
    add("--epochs", type=options.positive_int, metavar="N", help="passes over the images (default (a) 8, (b) 30)")
    add("--quick", action="store_true", help="2 seeds, 3 epochs and 400 images unless given: half a minute")
    options.add_data_options(parser)
    # Layers for four small images have too little work to share: on a busy machine threads cost more than they bring.
    add("--threads", type=options.positive_int, default=1, metavar="N", help="CPU threads (default 1)")
    add("--output", type=Path, default=Path("runs/small_batches"), metavar="DIR", help="default %(default)s")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.epochs, chosen.limit = chosen.epochs or 3, chosen.limit or 400
    chosen.seeds = chosen.seeds or (2 if chosen.quick else 3)
    return chosen


def contests(epochs: int | None = None) -> tuple[list[Contest], Contest]:
    """Those of panel (a) and that of panel (b)."""
    # Four images say little about the data: 0.01 averages over about a hundred batches for evaluation.
    mixed = Contest(
        "4 images, mixed", (PLAIN, RENORM), Settings(4, epochs or 8, learning_rate=0.01), momentum=0.01, augmented=True,
        line="--",
    )  # fmt: skip
    one_class = replace(mixed, batches="4 images of one class", kind=OneClassTraining, line="-")
    # 0.28: the 0.1 of train_cnn.py times the root of 512 / 64, the rule of the paper of ghost batches. Three steps are
    # an epoch here, so the average for evaluation must be short. What ghost batches may help against is overfitting;
    # augmentation helps against it too and would hide it in the accuracy.
    large = Contest(
        "512 images, mixed", (PLAIN, GHOSTS), Settings(512, epochs or 30, learning_rate=0.28), momentum=0.3,
        augmented=False,
    )  # fmt: skip
    return [mixed, one_class], large


def run(contest: Contest, chosen: argparse.Namespace) -> Runs:
    """Trains both rivals with each seed."""
    runs: Runs = {(contest, rival): [] for rival in contest.rivals}
    # disable=None: no bar where nobody watches, as in a log file
    with tqdm(desc=contest.batches, leave=False, disable=None, unit="batch") as bar:
        for seed in range(chosen.seeds):
            dataset = data.load(chosen.data, chosen.root, seed).with_first(chosen.limit)
            for rival in contest.rivals:
                training = prepare(contest, rival, dataset, seed)
                bar.total = training.batches * contest.settings.epochs * chosen.seeds * len(contest.rivals)
                for _ in range(contest.settings.epochs):
                    training.epoch(partial(ticking, bar))
                runs[contest, rival].append(training.history)
    return runs


def prepare(contest: Contest, rival: str, dataset: data.Dataset, seed: int) -> Training:
    """A training at its start, and torch's generator where each rival of the seed finds it: train before the next."""
    torch.manual_seed(seed)
    if not contest.augmented:
        dataset = replace(dataset, shift=0, mirror=False)
    steps = contest.settings.epochs * -(-len(dataset.train) // contest.settings.batch_size)
    norm = partial(torch_bn.BatchNorm2d, momentum=contest.momentum, **norm_options(rival, steps))
    model = ResidualNetwork(dataset.channels, data.CLASSES, WIDTH, norm)
    return contest.kind(model, dataset, contest.settings, torch.device("cpu"))


def norm_options(rival: str, steps: int) -> dict[str, object]:
    """What makes a rival's layers, in a training of so many steps."""
    if rival == RENORM:
        return {"renorm": True, "renorm_clipping": torch_bn.schedules.paper(scale=steps / PAPER_STEPS)}
    if rival == GHOSTS:
        return {"virtual_batch_size": 32}
    return {}


def ticking(bar: tqdm, batches: Iterator) -> Iterator:
    for batch in batches:
        yield batch
        bar.update()


def table_line(contest: Contest, rival: str, runs: Runs) -> str:
    """The last epochs of a rival's trainings under :data:`HEADER`."""
    last = [history[-1] for history in runs[contest, rival]]
    accuracies = [row["held_out_accuracy"] for row in last]
    held_out_loss, loss = (mean(row[name] for row in last) for name in ("held_out_loss", "loss"))
    return (
        f"{contest.batches:27}{rival:14}{mean(accuracies):8.4f}{min(accuracies):8.4f}{max(accuracies):8.4f}"
        f"{held_out_loss:12.4f}{loss:11.4f}"
    )


def bands(contests: Sequence[Contest], runs: Runs) -> list[report.Band]:
    """The curves of one panel."""
    return [
        report.Band(f"{rival}, {contest.batches}", runs[contest, rival], COLORS[rival], contest.line)
        for contest in contests
        for rival in contest.rivals
    ]


if __name__ == "__main__":
    sys.exit(main())
