"""The memory traffic of kernels that walk a tensor twice, once for the sums and once for the result."""

from ..cases import Case
from .network import ADD_RELU, PLAIN, RELU

# Tensors of the size of the input; the vectors of one value per channel are small beside them.
TENSORS = {
    (PLAIN, "forward"): 3,  # read x; read x, write y
    (PLAIN, "backward"): 5,  # read x and dy; read both, write dx
    (PLAIN, "inference"): 2,
    # The activation is applied on the way out, and where it was zero is found again from x.
    (RELU, "forward"): 3,
    (RELU, "backward"): 5,
    (RELU, "inference"): 2,
    (ADD_RELU, "forward"): 4,  # the residual is read once more
    (ADD_RELU, "backward"): 8,  # read x, dy and residual; read them again, write dx and dresidual
    (ADD_RELU, "inference"): 3,
}
COPY_TENSORS = 2


def moved_bytes(kind: str, direction: str, case: Case) -> int:
    """What a batch norm of two passes moves if nothing of the first is left in a cache for the second."""
    return TENSORS[kind, direction] * case.tensor_bytes


def copied_bytes(case: Case) -> int:
    return COPY_TENSORS * case.tensor_bytes
