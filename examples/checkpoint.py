"""Checkpoints on disk: written atomically, checked byte for byte before they are believed."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from files import replacing

KIND = "torch_bn examples, training state 1"


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message is one sentence for the user."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes ``state`` (tensors and plain Python values) to ``path``; an older file is replaced whole or not at all."""
    with replacing(path) as file:
        try:
            torch.save({"kind": KIND, **state}, file)
        except RuntimeError as error:
            # On its way out torch ends the archive, and hides Ctrl-C behind what it finds wrong with that.
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            raise


def load(path: Path) -> dict[str, Any]:
    """Reads what :func:`save` wrote, tensors on the CPU.

    Raises:    CheckpointError if there is no such file, if a byte of it is damaged, or if something else wrote it.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not verify the checksums that torch.save writes
        # weights_only: a checkpoint from elsewhere must not be able to run code
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and torch raise more than ten types for a damaged file
        raise CheckpointError(f"{path}: the checkpoint is damaged or is none ({type(error).__name__})") from error
    if damaged:
        raise CheckpointError(f"{path}: the checkpoint is damaged (wrong checksum of {damaged})")
    if not isinstance(state, dict) or state.get("kind") != KIND:
        raise CheckpointError(f"{path}: the file is no checkpoint of train_cnn.py")
    return state
