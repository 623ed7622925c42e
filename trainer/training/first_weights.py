"""Start a run from weights made elsewhere: rank 0 writes a checkpoint of step 0, all ranks resume from it.

So every layout and engine, and a restart after a kill, read them on the path of any other checkpoint.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from trainer.checkpoint.coverage import is_average
from trainer.checkpoint.find_checkpoint import CheckpointHandle, find_newest
from trainer.checkpoint.plan import Placement, local_placements
from trainer.checkpoint.plan_together import have_same_tensors
from trainer.checkpoint.streamed import GlobalTensor
from trainer.distributed.collective_errors import raise_together
from trainer.errors import ConfigError
from trainer.training.run import RunState


class FirstWeights(Protocol):
    """Weights that `init_from` names, on rank 0."""

    def verify(self, *, warn: Callable[[str], None]) -> None:
        """Check all that can be checked before the run folder is made.

        Raises:
            TurnoutError: if the weights are damaged or do not fit the new model.
        """
        ...

    def save(self, run: RunState, tensors: Mapping[str, GlobalTensor]) -> Sequence[str]:
        """Save the checkpoint of step 0 with these tensors, and return lines about them; nothing is left on an error.

        `tensors` are those of the run's whole state, moments of the optimizer included.
        """
        ...


def save_first_weights(run: RunState, weights: FirstWeights | None) -> CheckpointHandle:
    """Let rank 0 save the checkpoint of step 0; return it, verified by all ranks. Collective.

    Raises:
        ConfigError: if whoever started the run made nothing of its `init_from`.
    """
    world = run.mesh.world
    world.recorder.enter("writing the first weights")
    tensors: dict[str, GlobalTensor] = {}
    held = local_placements(run.engine.wanted())
    everyone: list[Any] = [held] if have_same_tensors(held, world) else world.all_gather_objects(held)
    for name, values in (item for of_rank in everyone for item in of_rank.items()):
        if not is_average(name):  # these begin at the weights
            tensors[name] = GlobalTensor.like(Placement(*values))
    with raise_together(world):
        if run.mesh.layout.rank == 0:
            if weights is None:
                raise ConfigError("init_from: is for `turnout train` and `launch`; set it to null here")
            for line in weights.save(run, tensors):
                run.console.message(line)
    checkpoint = find_newest(run.saver.folder, world, warn=run.console.warning)
    assert checkpoint is not None, "rank 0 has saved one"
    return checkpoint
