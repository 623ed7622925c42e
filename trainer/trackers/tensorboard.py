"""TensorBoard tracker: event files in the run folder, in which repeated steps replace earlier ones."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.metrics.expert_load import layer_loads
from trainer.trackers.base import Logged

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardTracker:
    """Writes metrics as scalars under their own keys, and expert loads as histograms over the expert index."""

    def __init__(
        self,
        folder: Path,
        *,
        start_step: int,
        heatmap_every: int | None,
        moe_layers: Sequence[int],
        config_text: str,
        warn: Callable[[str], None],
    ) -> None:
        """Open the event files in `folder`; events after `start_step`, the completed steps, are purged.

        `heatmap_every` logged steps there is a histogram of the loads of the layers `moe_layers`; None: never.
        """
        self._folder, self._heatmap_every, self._moe_layers, self._warn = folder, heatmap_every, moe_layers, warn
        self._config_text, self._num_steps = config_text, 0
        self._writer: SummaryWriter | None = None
        self._attempt(lambda: self._open(start_step))

    def log(self, record: Logged, experts: Logged | None = None) -> None:
        """Write a record and flush it."""
        if self._writer is not None and not self._folder.is_dir():  # removed during the run
            self._attempt(lambda: self._open(int(record["step"]) - 1))
        if self._writer is not None:
            self._attempt(lambda: self._write(record, experts))

    def written(self) -> list[tuple[str, str]]:
        """Return the folder of the event files; nothing if writing failed."""
        return [] if self._writer is None else [("tensorboard", str(self._folder))]

    def close(self, exit_code: int, *, patience_s: float) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._attempt(self._writer.close)
            self._writer = None

    def _open(self, start_step: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about TensorBoard's imports
            from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=start_step + 1)
        self._writer.add_text("config", f"```yaml\n{self._config_text}\n```", start_step + 1)

    def _write(self, record: Logged, experts: Logged | None) -> None:
        assert self._writer is not None
        step = int(record["step"])
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(key, value, step)
        if experts is not None:
            self._num_steps += 1
            if self._heatmap_every is not None and (self._num_steps - 1) % self._heatmap_every == 0:
                for key, loads in layer_loads(experts, self._moe_layers).items():  # bin i is the load of expert i
                    size, squares = len(loads), sum(load * load for load in loads)
                    limits = [float(i + 1) for i in range(size)]
                    self._writer.add_histogram_raw(key, 0, size, size, sum(loads), squares, limits, loads, step)
        self._writer.flush()

    def _attempt(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:
            self._writer = None
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._warn(f"{self._folder}: TensorBoard logging is off: {reason}; metrics.jsonl is complete")
