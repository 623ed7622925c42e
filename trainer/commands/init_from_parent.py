"""First weights of a run that `init_from` names, found and compared as far as that needs no torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.init_from import InitFromConfig
from trainer.checkpoint.run_folder import RunFolder
from trainer.convert.weight_parent import PublishedParent, RunParent, check_models, find_parent
from trainer.experiment import ExperimentConfig

if TYPE_CHECKING:
    from trainer.convert.init_weights import InitWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundParent:
    """The model that a run begins with, whose keys fit; none of its bytes have been read."""

    config: ExperimentConfig
    """Of the new run."""
    init: InitFromConfig
    parent: RunParent | PublishedParent
    notes: list[str]
    """Lines about the keys in which the two models differ."""

    def first_weights(self) -> "InitWeights":
        """Return its weights; this imports torch."""
        from trainer.convert.init_weights import InitWeights

        return InitWeights(self.config, self.init, self.parent, self.notes)


def find_first_weights(config: ExperimentConfig, folder: RunFolder) -> "InitWeights | None":
    """Return the first weights of a run; None if it takes none, as `check_first_weights`, whose errors it raises."""
    found = check_first_weights(config, folder)
    return None if found is None else found.first_weights()


def check_first_weights(config: ExperimentConfig, folder: RunFolder) -> FoundParent | None:
    """Return the parent of a run, once the two models are compared; imports no torch.

    None without `init_from`, or if the run has a checkpoint to resume from.

    Raises:
        ConfigError: if it is of another model.
        CheckpointError: if there is none.
        DataError: if the published folder is unusable.
    """
    if config.init_from is None or CheckpointFolder(folder.checkpoints).steps():
        return None
    parent = find_parent(config.init_from, folder)
    notes = check_models(config.init_from, parent, config.model)
    return FoundParent(config=config, init=config.init_from, parent=parent, notes=notes)
