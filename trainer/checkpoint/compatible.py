"""Whether a state fits a model, said in the user's terms before anything is copied."""

from pathlib import Path

from trainer.checkpoint.state import TrainState
from trainer.errors import CheckpointError


def check_fits(path: Path, saved: TrainState, mine: TrainState) -> None:
    """Compare names, shapes and dtypes of two states.

    Raises:
        CheckpointError: with the first difference and how many there are.
    """
    differences = []
    for name in sorted(saved.slices.keys() | mine.slices.keys()):
        have, want = saved.slices.get(name), mine.slices.get(name)
        if have is None:
            differences.append(f"{name} is not in it")
        elif want is None:
            differences.append(f"it has {name}, which this model does not")
        elif have.global_shape != want.global_shape:
            differences.append(f"{name} is {list(have.global_shape)} in it and {list(want.global_shape)} in this model")
        elif have.tensor.dtype != want.tensor.dtype:
            differences.append(f"{name} is {have.tensor.dtype} in it and {want.tensor.dtype} in this model")
    if differences:
        more = f" (and {len(differences) - 1} more differences)" if len(differences) > 1 else ""
        raise CheckpointError(
            f"{path}: was written by a different model: {differences[0]}{more}; use the run's own config, or a new name"
        )
