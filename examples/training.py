"""One training: a model, its optimizer and what they have seen; trains epoch by epoch and can be saved in between."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from data import Dataset, Images, augment
from torch import Tensor, nn

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
EVALUATION_BATCH = 1000


class DivergedError(Exception):
    """The loss is no longer finite; the message is one sentence for the user."""


@dataclass(frozen=True)
class Settings:
    """How to train. ``learning_rate`` is the peak of a one-cycle schedule over all ``epochs``."""

    batch_size: int
    epochs: int
    learning_rate: float
    amp: bool = False  # bfloat16 where autocast allows it; its range is float32's, so no loss scaling
    channels_last: bool = False


class Training:
    """Trains ``model`` on ``dataset`` with SGD. All randomness comes from torch's global generators.

    ``history`` holds one row per finished epoch: epoch, loss, train_accuracy (of the augmented batches, as they were
    trained on), held_out_loss, held_out_accuracy, seconds (of training alone) and learning_rate (after the epoch).
    """

    def __init__(self, model: nn.Module, dataset: Dataset, settings: Settings, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.model = model.to(device, memory_format=self.memory_format)
        self.dataset = dataset
        self.train_images, self.held_out = dataset.train.to(device), dataset.held_out.to(device)
        self.optimizer = torch.optim.SGD(
            model.parameters(), settings.learning_rate, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
        )
        self.batches = math.ceil(len(dataset.train) / settings.batch_size)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, settings.learning_rate, settings.epochs * self.batches, cycle_momentum=False
        )
        self.history: list[dict[str, float]] = []

    def epoch(self, progress: Callable[[Iterator], Iterator] = iter) -> dict[str, float]:
        """Trains for one epoch, judges the model and appends the row to ``history``; ``progress`` wraps the batches.

        Raises:    DivergedError if the loss of the epoch is infinite or not a number.
        """
        started = self._seconds()
        loss, train_accuracy = self._pass_over_training_images(progress)
        seconds = self._seconds() - started
        number = len(self.history) + 1
        if not math.isfinite(loss):
            raise DivergedError(f"the loss became {loss} in epoch {number}; a smaller learning rate may help")
        held_out_loss, held_out_accuracy = self.judge(self.held_out)
        row = {
            "epoch": number,
            "loss": loss,
            "train_accuracy": train_accuracy,
            "held_out_loss": held_out_loss,
            "held_out_accuracy": held_out_accuracy,
            "seconds": seconds,
            "learning_rate": self.scheduler.get_last_lr()[0],
        }
        self.history.append(row)
        return row

    def gradients(self, images: Images) -> tuple[Tensor, Tensor]:
        """Sets the gradients of the parameters for a batch; its mean loss and how many the model classified right."""
        self.model.train()
        pixels = augment(images.pixels, self.dataset.shift, self.dataset.mirror)
        with self._autocast():
            scores = self.model(self._normalized(pixels))
            loss = F.cross_entropy(scores, images.labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach(), (scores.argmax(1) == images.labels).sum()

    def shuffled_batches(self) -> Iterator[Images]:
        """The training images, each once, in a new order; the last batch may be smaller."""
        for index in torch.randperm(len(self.train_images)).to(self.device).split(self.settings.batch_size):
            yield self.train_images.at(index)

    def accuracy(self, images: Images) -> float:
        """The part of ``images`` that the model classifies correctly in evaluation mode, in [0, 1]."""
        return self.judge(images)[1]

    @torch.inference_mode()
    def judge(self, images: Images) -> tuple[float, float]:
        """The mean loss and the accuracy of the model on ``images`` in evaluation mode."""
        self.model.eval()
        loss, correct = 0.0, 0
        for start in range(0, len(images), EVALUATION_BATCH):
            batch = slice(start, start + EVALUATION_BATCH)
            labels = images.labels[batch]
            with self._autocast():
                scores = self.model(self._normalized(images.pixels[batch]))
                loss += F.cross_entropy(scores, labels, reduction="sum").item()
            correct += int((scores.argmax(1) == labels).sum())
        return loss / len(images), correct / len(images)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the training depends on, and the history."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generators": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
            "history": self.history,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave, so that training goes on as if it had never stopped."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["generators"]["cpu"])
        if len(state["generators"]["cuda"]) == torch.cuda.device_count():  # saved on a machine like this one
            torch.cuda.set_rng_state_all(state["generators"]["cuda"])
        self.history = list(state["history"])

    def _pass_over_training_images(self, progress: Callable[[Iterator], Iterator]) -> tuple[float, float]:
        """One optimizer step per batch; the mean loss and the accuracy over all images."""
        loss_sum, correct_sum = torch.zeros(2, dtype=torch.float64, device=self.device)
        for images in progress(self.shuffled_batches()):
            loss, correct = self.gradients(images)
            self.optimizer.step()
            self.scheduler.step()
            loss_sum += loss * len(images)
            correct_sum += correct
        return loss_sum.item() / len(self.train_images), correct_sum.item() / len(self.train_images)

    def _normalized(self, pixels: Tensor) -> Tensor:
        return (pixels.float() / 127.5 - 1).contiguous(memory_format=self.memory_format)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp)

    def _seconds(self) -> float:
        if self.device.type == "cuda":  # kernels run behind the clock
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
