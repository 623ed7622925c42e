"""Take a real step of a config on the ranks that were started, and say what is wrong with it."""

from trainer.distributed import runtime
from trainer.distributed.mesh import joined
from trainer.distributed.rank_layout import Layout
from trainer.doctor.diagnosis import Diagnosis
from trainer.doctor.step.measure_step import measure_step
from trainer.doctor.step.step_checks import STEP_CHECKS
from trainer.doctor.step.text_checks import TEXT_CHECKS
from trainer.errors import ConfigError, DataError, ResourceError
from trainer.experiment import ExperimentConfig
from trainer.prove.small_config import shrink


def diagnose_step(config: ExperimentConfig, layout: Layout, *, is_small: bool) -> Diagnosis:
    """Return what is found in the first step of a config, or of a small copy of it. Collective.

    On one rank, a step that cannot be taken here is a note: the machine that trains may be another.
    """
    notes = list[str]()
    if config.init_from is not None:
        notes.append("the step was taken from the initial values of the seed, not from init_from")
    try:
        config = shrink(config) if is_small else config
        device = runtime.start(config.parallel.device)
        with joined(layout, device, timeout_s=config.parallel.timeout_s) as mesh:
            evidence = measure_step(config, mesh, device, warn=notes.append)
    except (ConfigError, DataError, ResourceError) as error:
        if layout.world_size > 1:
            raise
        remedy = "; --scale small takes one of a small copy" if isinstance(error, ResourceError) else ""
        return Diagnosis(notes=[f"no step was taken: {error}{remedy}"])
    if layout.world_size > 1:
        notes.append("what a layer does is measured on one rank: run the command without a launcher, too")
    return Diagnosis.of((*STEP_CHECKS, *TEXT_CHECKS), evidence, notes=notes)
