"""The least memory traffic of an operation, in bytes: every tensor it needs is read once, every result written once."""

from .cases import Case

# Tensors of the size of the input. The vectors of one value per channel are left out: they are small beside them.
PASSES = {
    "forward": 2,  # read x, write y
    "backward": 3,  # read x, read dy, write dx
    "forward+backward": 5,
    "inference": 2,  # read x, write y
}
COPY_PASSES = 2  # read x, write its copy


def least_bytes(case: Case, direction: str) -> int:
    """The bytes that a batch norm cannot do without: what GB/s and the share of copy bandwidth are counted from."""
    return PASSES[direction] * case.tensor_bytes


def copy_bytes(case: Case) -> int:
    """The bytes that `x.clone()` moves."""
    return COPY_PASSES * case.tensor_bytes
