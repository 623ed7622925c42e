"""Contract of a tracker: it accepts the records of a run and says where they are."""

import pickle
import tempfile
from pathlib import Path

from trainer.contracts.ensure import ensure
from trainer.metrics.config import TrackerOptions

_RECORD = {"step": 1, "time": 1.0, "loss": 2.5, "lr": 1e-3, "eval/loss": None}
_EXPERTS = {"step": 1, "counts": [[3, 1], [2, 2]]}


def records_are_accepted(config: TrackerOptions) -> None:
    """Records of training and evaluation are accepted, and the tracker can be closed."""
    with tempfile.TemporaryDirectory() as folder:
        tracker = config.build(Path(folder), start_step=0, config={"name": "check"})
        tracker.log(_RECORD, _EXPERTS)
        tracker.log({**_RECORD, "step": 2})
        places = tracker.written()
        ensure(all(len(place) == 2 for place in places), f"written() gives {places}, not pairs of label and place")
        tracker.close(0, patience_s=1.0)


def config_can_be_sent(config: TrackerOptions) -> None:
    """The config can be pickled."""
    ensure(pickle.loads(pickle.dumps(config)) == config, "a pickled config differs")


CHECKS = [records_are_accepted, config_can_be_sent]
