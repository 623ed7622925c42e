"""Clock of a device, for the step timer."""

import torch

from trainer.step_timer import Clock, HostClock


class CudaClock:
    """Clock by CUDA events, which the GPU records when it reaches them, long after the CPU."""

    def now(self) -> torch.cuda.Event:
        """Record and return an event on the current stream."""
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Return the time between two events; waits for the second one."""
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def clock_of(device: torch.device) -> Clock:
    """Return the clock for a device."""
    return CudaClock() if device.type == "cuda" else HostClock()
