"""First weights of a run by its `init_from`: of a run, a checkpoint or a published model, a few rows at a time."""

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from trainer.checkpoint.coverage import is_moment
from trainer.checkpoint.init_from import InitFromConfig
from trainer.checkpoint.streamed import GlobalTensor, save_streamed
from trainer.convert.first_record import check_room
from trainer.convert.first_tensors import FirstTensors
from trainer.convert.init_plan import InitPlan
from trainer.convert.parent_tensors import ParentTensors, open_parent
from trainer.convert.watched_tensors import WatchedTensors
from trainer.convert.weight_parent import PublishedParent, RunParent
from trainer.experiment import ExperimentConfig
from trainer.training.run import RunState


class InitWeights:
    """The weights that a config names; `trainer.training.first_weights.FirstWeights`."""

    def __init__(
        self, config: ExperimentConfig, init: InitFromConfig, parent: RunParent | PublishedParent, notes: Sequence[str]
    ) -> None:
        """Create them for a config with `init_from`; `notes` are about the keys in which the two models differ."""
        self._config, self._init, self._parent, self._notes = config, init, parent, list(notes)
        self._tensors: ParentTensors | None = None

    def verify(self, *, warn: Callable[[str], None]) -> None:
        """Verify every byte of a checkpoint, and compare all names and shapes.

        Raises:
            CheckpointError: if it is damaged.
            ConfigError: if a tensor does not fit the new model.
        """
        self._tensors = open_parent(self._parent, warn=warn)
        InitPlan(self._config, self._init, self._tensors, num_ids=self._config.model.vocab_size or 1)
        for note in self._notes:
            warn(note)

    def save(self, run: RunState, tensors: Mapping[str, GlobalTensor]) -> list[str]:
        """Save the checkpoint of step 0 and made_from.json; return lines about them. After an error neither is left."""
        assert self._tensors is not None, "verify comes first"
        folder, tokenizer = run.folder, run.corpus.tokenizer
        with self._tensors as parent:
            plan = InitPlan(self._config, self._init, parent, num_ids=tokenizer.vocab_size)
            wanted = {name: tensor for name, tensor in tensors.items() if plan.has_moments or not is_moment(name)}
            size_bytes = sum(tensor.size_bytes for tensor in wanted.values())
            check_room(folder.path, size_bytes, of="the first weights")
            reader = FirstTensors(wanted, plan.sources(wanted, tokenizer))
            plan.check_engine()
            record, details = self._record(run, plan), self._details(plan)
            for path in (folder.run_id, folder.origin):
                path.unlink(missing_ok=True)  # of a run that never had a checkpoint
            try:
                folder.write(folder.made_from, json.dumps(details) + "\n")
                with run.console.progress_bar("writing the first weights", size_bytes) as bar:
                    watched = WatchedTensors(reader, bar)
                    save_streamed(run.saver.folder, wanted, watched, record, values=plan.values)
            except BaseException:
                if not run.saver.folder.of_step(0).exists():
                    folder.made_from.unlink(missing_ok=True)
                raise
        return plan.notes

    def _record(self, run: RunState, plan: InitPlan) -> dict[str, Any]:
        """Return the checkpoint's record of the run."""
        parent = plan.parent.parent
        return {
            **run.checkpoint_info(),
            "id": secrets.token_hex(8),
            "parent": None if parent is None else asdict(parent),
            "made_from": "init_from",
            "data_fingerprint": None,  # no text has been read
            "optimizer_steps_taken_over": plan.optimizer_steps,
        }

    def _details(self, plan: InitPlan) -> dict[str, Any]:
        """Return the content of made_from.json."""
        parent = plan.parent.parent
        return {
            "command": "init_from",
            "options": self._init.model_dump(mode="json", exclude_defaults=True),
            "from": plan.parent.record(),
            "parents": [] if parent is None else [asdict(parent)],
            "notes": plan.notes,
        }
