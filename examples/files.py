"""Files that are either whole or untouched: what a run writes survives a crash, a full disk and Ctrl-C."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file beside ``path`` for writing and moves it over ``path`` once its bytes are on the disk.

    When the block raises, ``path`` keeps its old content and the temporary file is removed.
    """
    # NB: a fixed name, so that runs killed in the middle of writing do not pile up temporary files.
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # without it a power cut may leave the new name with old or no bytes
        os.replace(part, path)
    except BaseException:  # KeyboardInterrupt too
        part.unlink(missing_ok=True)
        raise
