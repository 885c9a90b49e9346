"""Values for `renorm_clipping`: how far Batch Renormalization may leave a batch's own statistics, step by step.

A step is the number of training batches that a layer has seen before, 0 for the first. The schedules are dicts of plain
objects that can be copied, pickled and compared, so that layers that have one can be, too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real

from torch import Tensor

Value = float | Tensor | None
Clipping = Mapping[str, Value | Callable[[int], Value]]
Schedule = dict[str, Value | Callable[[int], Value]]

_KEYS = ("rmax", "rmin", "dmax")


@dataclass(frozen=True)
class _Ramp:
    """`first` until start_step, `last` from end_step on, and on a straight line in between."""

    first: float
    last: float
    start_step: float
    end_step: float

    def __call__(self, step: int) -> float:
        share = min(max((step - self.start_step) / (self.end_step - self.start_step), 0.0), 1.0)
        # NB: not first + share * (last - first), which may miss `last` by a rounding.
        return (1 - share) * self.first + share * self.last


@dataclass(frozen=True)
class _Jump:
    """`first` before at_step, `last` from it on."""

    first: float
    last: float
    at_step: float

    def __call__(self, step: int) -> float:
        return self.last if step >= self.at_step else self.first


@dataclass(frozen=True)
class _Inverse:
    of: Callable[[int], float]

    def __call__(self, step: int) -> float:
        return 1 / self.of(step)


def paper(scale: float = 1.0) -> Schedule:
    """The schedule of the paper: plain batch normalization (rmax 1, dmax 0) for 5000 steps, then rmax goes up to 3 at
    step 40000 and dmax to 5 at step 25000, each on a straight line. rmin = 1 / rmax.

    Args:
        scale: factor of the three step numbers, for other lengths of training; > 0. Default: 1.0.

    Returns:
        A dict with rmax, rmin and dmax, functions of the step.

    Raises:
        TypeError, ValueError: another scale.

    Source:
        Ioffe, Batch Renormalization, 2017, arXiv:1702.03275, section 4. "Gradually", it says; the line is our reading.
    """
    factor = _checked("paper: scale", scale, 0)
    if factor == 0:
        raise ValueError(f"paper: scale must be > 0, got {scale}")
    rmax = _Ramp(1.0, 3.0, 5000 * factor, 40000 * factor)
    dmax = _Ramp(0.0, 5.0, 5000 * factor, 25000 * factor)
    return {"rmax": rmax, "rmin": _Inverse(rmax), "dmax": dmax}


def crossq(warmup_steps: float = 100_000) -> Schedule:
    """The schedule of CrossQ: plain batch normalization (rmax 1, rmin 1, dmax 0) for the first `warmup_steps` steps,
    then at once rmax 3, rmin 1/3, dmax 5.

    Args:
        warmup_steps: a finite number >= 0. Default: 100000.

    Returns:
        A dict with rmax, rmin and dmax, functions of the step.

    Raises:
        TypeError, ValueError: other warmup_steps.

    Source:
        Bhatt et al., CrossQ, 2024, arXiv:1902.05605; numbers and jump as in github.com/adityab/CrossQ.
    """
    at_step = _checked("crossq: warmup_steps", warmup_steps, 0)
    rmax = _Jump(1.0, 3.0, at_step)
    return {"rmax": rmax, "rmin": _Inverse(rmax), "dmax": _Jump(0.0, 5.0, at_step)}


def linear(start_step: float, end_step: float, rmax: float = 3.0, dmax: float = 5.0) -> Schedule:
    """Plain batch normalization until `start_step`; from there rmax goes from 1 and dmax from 0 to the given values at
    `end_step`, on straight lines, and they stay. rmin = 1 / rmax.

    Args:
        start_step, end_step: finite numbers, 0 <= start_step < end_step.
        rmax: the last rmax, finite and >= 1. Default: 3.0.
        dmax: the last dmax, finite and >= 0. Default: 5.0.

    Returns:
        A dict with rmax, rmin and dmax, functions of the step.

    Raises:
        TypeError, ValueError: other arguments.
    """
    start = _checked("linear: start_step", start_step, 0)
    end = _checked("linear: end_step", end_step, 0)
    if not end > start:
        raise ValueError(f"linear: end_step must be > start_step, {start_step}, got {end_step}")
    ramp = _Ramp(1.0, _checked("linear: rmax", rmax, 1), start, end)
    return {
        "rmax": ramp,
        "rmin": _Inverse(ramp),
        "dmax": _Ramp(0.0, _checked("linear: dmax", dmax, 0), start, end),
    }


def check_clipping(clipping: object) -> None:
    """Raises for what no layer can take as `renorm_clipping`. The values of functions are checked when they are called.

    Args:
        clipping: None, or a dict with keys among rmax, rmin, dmax, whose values are numbers, tensors of one element,
            functions of the step, or None for no bound, as for a key that is absent.

    Raises:
        TypeError: anything but a dict or None, or another kind of value; a bool is no number here.
        ValueError: another key.
    """
    if clipping is None:
        return
    keys = ", ".join(_KEYS)
    if not isinstance(clipping, Mapping):
        raise TypeError(
            f"renorm_clipping must be a dict with keys among {keys}, or None, got {type(clipping).__name__}"
        )
    unknown = [key for key in clipping if key not in _KEYS]
    if unknown:
        raise ValueError(f"renorm_clipping: keys must be among {keys}, got {', '.join(map(repr, unknown))}")
    for key, value in clipping.items():
        if not (_is_value(value) or callable(value)):
            raise TypeError(
                f"renorm_clipping[{key!r}] must be a number, a tensor of one element, a function of the step, or None, "
                f"got {_kind(value)}"
            )


def clipping_at(clipping: Clipping | None, step: int) -> tuple[float | None, float | None, float | None]:
    """The bounds that hold at a step. Reading a tensor waits for its device.

    Args:
        clipping: see :func:`check_clipping`.
        step: what functions are called with.

    Returns:
        rmin, rmax, dmax; None is no bound.

    Raises:
        TypeError: a value, or what a function returned, is neither a number nor a tensor of one element nor None.
    """
    if clipping is None:
        return None, None, None
    return _value_at(clipping, "rmin", step), _value_at(clipping, "rmax", step), _value_at(clipping, "dmax", step)


def _value_at(clipping: Clipping, key: str, step: int) -> float | None:
    value = clipping.get(key)
    if type(value) is float:  # as nearly all are: the questions below take microseconds, at every forward
        return value
    called = callable(value)
    if callable(value):
        value = value(step)
    if not _is_value(value):
        raise TypeError(
            f"renorm_clipping[{key!r}]{f'({step})' if called else ''} must be a number, a tensor of one element, "
            f"or None, got {_kind(value)}"
        )
    if value is None:
        return None
    return float(value.item() if isinstance(value, Tensor) else value)


def _is_value(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return value is None or (isinstance(value, Real) and not isinstance(value, bool))


def _kind(value: object) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _checked(what: str, value: object, least: int) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{what} must be a number, got {value!r}")
    number = float(value)
    if not least <= number < float("inf"):
        raise ValueError(f"{what} must be finite and >= {least}, got {value}")
    return number
