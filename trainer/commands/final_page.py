"""The page about a run in its folder, which rank 0 writes when a training ends. Imports no torch."""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Final

from trainer import fault_injection
from trainer.atomic_io import replace_file
from trainer.checkpoint.run_folder import RunFolder
from trainer.distributed.signals import StopRequest
from trainer.errors import first_line
from trainer.experiment import ExperimentConfig
from trainer.report.report_data import ReportData, report_json
from trainer.report.run_card import card_of_run
from trainer.runs.recorded_run import RecordedRun
from trainer.status import StatusFile
from trainer.supervise.die_with_parent import end_with
from trainer.terminal import print_safe

LIMIT_S: Final = 240.0
"""Time to measure a run: torchrun on other machines waits 5 minutes for this rank."""
_POLL_S: Final = 0.05


def write_final_page(
    config: ExperimentConfig, folder: RunFolder, status: StatusFile, stop: StopRequest, *, is_finished: bool
) -> None:
    """Write the page of a run whose training ended, as `metrics.report` says, on rank 0 alone.

    The process groups are closed, so no rank waits. Of a run that was stopped, which is to end soon and will go on,
    only the logs are shown. The training is done and saved: whatever goes wrong here is a warning.
    """
    how = config.metrics.report
    if how is None:
        return
    status.enter("reporting")
    try:
        fault_injection.hit("report.page")
        _write_from_logs(config, folder)
        if how == "full" and is_finished:
            _measure(folder, stop)
        print_safe(f"  report      {folder.report}")
    except Exception as error:  # any fault of the page, whatever it is
        why = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        remedy = f"write it by: python -m trainer report {folder.path} -o FILE"
        print_safe(f"warning: {folder.report}: {why or type(error).__name__}; {remedy}", file=sys.stderr)


def _write_from_logs(config: ExperimentConfig, folder: RunFolder) -> None:
    """Write the page and the numbers that config and logs are enough for."""
    from trainer.report.report_page import report_html

    run = RecordedRun(folder.path)
    remark = "The experts were not measured: this page is from the logs of the training alone. To measure them, run"
    remarks = (f"{remark}: python -m trainer report {folder.path} -o {folder.report}",)
    data = [ReportData(card=card_of_run(run, config), remarks=remarks)]
    replace_file(folder.report, report_html(data, [run]))
    replace_file(folder.report_numbers, json.dumps(report_json(data), allow_nan=False))


def _measure(folder: RunFolder, stop: StopRequest) -> None:
    """Replace both files by those of `report`, in a process whose memory, faults and time are not the training's.

    Raises:
        RuntimeError: if it failed, took too long or was stopped; the page from the logs stays.
    """
    _free_device()
    targets = ["-o", str(folder.report), "--json", str(folder.report_numbers)]
    command = [sys.executable, "-m", "trainer", "report", str(folder.path), *targets]
    environment = {name: value for name, value in os.environ.items() if name != "TURNOUT_FAULTS"}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            process_group=0,  # a terminal's Ctrl-C is for this process
            preexec_fn=end_with(os.getpid()),
        )
        end = time.monotonic() + LIMIT_S
        while process.poll() is None and not stop and time.monotonic() < end:
            time.sleep(_POLL_S)
        if process.returncode is None:
            process.kill()
            process.wait()
            why = f"was not done in {LIMIT_S:g} s" if not stop else f"was stopped by {stop.requested_by}"
            raise RuntimeError(f"the experts are not in it: measuring them {why}")
        if process.returncode != 0:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"]
            raise RuntimeError(f"the experts are not in it: {lines[-1]}")


def _free_device() -> None:
    """Return the memory that torch keeps for a model that is gone, which the other process needs on a GPU."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
