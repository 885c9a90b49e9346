"""How much memory a call takes on the CPU: exact, and the same at every run.

Counted is what torch's CPU allocator hands out and takes back during the call: tensors, those inside operations and
compiled code too, and the buffers of oneDNN. What was there before (parameters, inputs) does not count, even where the
call frees it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells on stderr whenever it starts and stops


@dataclass(frozen=True)
class Memory:
    """In bytes: the most that was alive at once, and what is still alive when the call has returned."""

    peak: int
    kept: int


def memory_of(call: Callable[[], Any]) -> Memory:
    """What a call takes. Its result is alive at the end, and counts as kept."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = profiler.profiler.kineto_results.events()
    # Frees have a negative size.
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    alive = list(accumulate((size for _, size in sorted(changes, key=lambda change: change[0])), initial=0))
    del result
    return Memory(max(alive), alive[-1])
