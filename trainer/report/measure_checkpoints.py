"""Compare the routing at the checkpoints that a run has kept, on the same text.

# L MoE layers, G domains, E experts.
"""

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.choice import CheckpointChoice
from trainer.errors import CheckpointError
from trainer.metrics.specialisation import mutual_information_bits
from trainer.report.measure_layer import load_imbalance, saturation
from trainer.report.read_checkpoint import MeasuredRun
from trainer.report.report_data import CheckpointFindings
from trainer.report.routed_text import Routed, route_rows
from trainer.training.load_trained import intact_checkpoint
from trainer.training.resume import load_state


def compare_checkpoints(
    loaded: MeasuredRun, last: Routed, most: int, remarks: list[str]
) -> tuple[CheckpointFindings, ...]:
    """Return the routing at the checkpoints that exist up to the measured one, on the same text."""
    if not last.choices:
        return ()
    folder = CheckpointFolder(loaded.run.folder.checkpoints)
    before = [step for step in folder.steps() if step < loaded.step]
    keep = min(len(before), most - 1)
    found = []
    for step in (before[i * len(before) // keep] for i in range(keep)):
        try:
            checkpoint = intact_checkpoint(folder, CheckpointChoice(step=step), loaded.warn)
            load_state(checkpoint, loaded.engine, loaded.config, loaded.corpus.tokenizer)
        except CheckpointError as error:
            remarks.append(f"The checkpoint of step {step} is left out: {error}")
            continue
        routed = route_rows(loaded.engine, loaded.batches, len(loaded.text.domains))
        found.append(_checkpoint(loaded, routed, last, step))
    if len(before) > keep:
        remarks.append(f"Of {len(before) + 1} checkpoints {keep + 1} are compared, evenly spaced.")
    return (*found, _checkpoint(loaded, last, last, loaded.step))


def _checkpoint(loaded: MeasuredRun, routed: Routed, last: Routed, step: int) -> CheckpointFindings:
    counts = [loaded.counts(routed, layer) for layer in range(len(routed.choices))]
    pairs = zip(routed.choices, last.choices, strict=True)
    return CheckpointFindings(
        step=step,
        loss=float(routed.loss_sum.sum()) / max(1, len(loaded.text.place)),
        saturation=tuple(saturation(now, end, loaded.num_experts) for now, end in pairs),
        mutual_information=tuple(mutual_information_bits(layer.tolist()) for layer in counts),
        router_entropy=routed.entropy,
        load_imbalance=tuple(load_imbalance(layer.sum(0).astype(float)) for layer in counts),
        dead_experts=sum(int((layer.sum(0) == 0).sum()) for layer in counts),
    )
