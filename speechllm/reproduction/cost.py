"""What a run costs: seconds by the clock and of the processor, and the peak of memory."""

import contextlib
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..trainers.memory import GiveMemoryBack


_RESET_PEAK = "5"  # see proc(5), /proc/pid/clear_refs


class Cost:
    """Measures what happens inside `with Cost() as cost:`; `cost.measured` is there afterwards.

    The processor's seconds, of all threads, are the steadier figure where other programs compete for the machine. The peak
    is that of the GPU where there is one, else the process's resident memory since `__enter__` (on systems other than
    Linux: since the process began).
    """

    def __enter__(self) -> "Cost":
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            GiveMemoryBack().on_train_end()
            with contextlib.suppress(OSError):  # a kernel without it: the peak is then the process's
                Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        self.clock, self.processor = time.monotonic(), time.process_time()
        return self

    def __exit__(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.measured = {
            "seconds": round(time.monotonic() - self.clock, 2),
            "processor_seconds": round(time.process_time() - self.processor, 2),
            "peak_memory_bytes": peak_memory(),
        }


def peak_memory() -> int:
    """Bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
