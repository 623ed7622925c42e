"""The clock of the device that computes."""

import torch

from trainer.step_timer import Clock, HostClock


class CudaClock:
    """A GPU's time: a mark is made when the GPU comes to it, while the processor is far ahead."""

    def now(self) -> torch.cuda.Event:
        """Return a mark in the present stream."""
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Return the time between two marks, once the GPU has come to the second one."""
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def clock_of(device: torch.device) -> Clock:
    """Return the clock by which work on a device is measured."""
    return CudaClock() if device.type == "cuda" else HostClock()
