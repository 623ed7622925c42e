"""First weights of a run that `init_from` names, found and compared as far as that needs no torch."""

from typing import TYPE_CHECKING

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.run_folder import RunFolder
from trainer.convert.weight_parent import check_models, find_parent
from trainer.experiment import ExperimentConfig

if TYPE_CHECKING:
    from trainer.convert.init_weights import InitWeights


def find_first_weights(config: ExperimentConfig, folder: RunFolder) -> "InitWeights | None":
    """Return the first weights of a run; None without `init_from`, or if the run has a checkpoint to resume from.

    Raises:
        ConfigError: if they are of another model.
        CheckpointError: if there are none.
        DataError: if the published folder is unusable.
    """
    if not check_first_weights(config, folder):
        return None
    from trainer.convert.init_weights import InitWeights

    assert config.init_from is not None, "it was checked"
    parent = find_parent(config.init_from, folder)
    return InitWeights(config, config.init_from, parent, check_models(config.init_from, parent, config.model))


def check_first_weights(config: ExperimentConfig, folder: RunFolder) -> bool:
    """Return whether a run takes its first weights from elsewhere, after comparing the two models; imports no torch."""
    if config.init_from is None or CheckpointFolder(folder.checkpoints).steps():
        return False
    check_models(config.init_from, find_parent(config.init_from, folder), config.model)
    return True
