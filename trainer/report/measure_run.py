"""Measure a run: load its checkpoints, route held-out text, and put all findings together.

# L MoE layers, G domains, E experts, N predicted tokens.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.convert.layer_traces import trace_layers
from trainer.experiment import ExperimentConfig
from trainer.metrics.specialisation import domain_entropy_bits, mutual_information_bits
from trainer.models.flops import model_size
from trainer.moe.causality import evaluation_warning
from trainer.report.describe_expert import DescribedText, describe_experts
from trainer.report.measure_checkpoints import compare_checkpoints
from trainer.report.measure_drops import count_drops, drop_rates
from trainer.report.measure_experts import compared_outputs, duplicates, weight_similarity
from trainer.report.measure_layer import as_matrix, coactivation, flow, load_imbalance
from trainer.report.measure_options import MeasureOptions
from trainer.report.read_checkpoint import MeasuredRun, read_checkpoint
from trainer.report.report_data import LayerFindings, MeasuredText, ReportData
from trainer.report.routed_text import Routed, route_rows
from trainer.report.run_card import card_of_run
from trainer.report.token_text import TokenText
from trainer.runs.recorded_run import RecordedRun

_MOST_COMPARED = 512
"""Tokens on which the outputs of all experts are compared."""


def measure_run(
    run: RecordedRun, config: ExperimentConfig, options: MeasureOptions, warn: Callable[[str], None]
) -> ReportData:
    """Return the numbers of a run; without a checkpoint those of its card alone.

    Raises:
        CheckpointError: if the checkpoint is damaged, or there is none of the step that was asked for.
        DataError: if the text of the run is gone.
    """
    checkpoints = CheckpointFolder(run.folder.checkpoints)
    if options.step is None and not checkpoints.steps():
        return ReportData(
            card=card_of_run(run, config), remarks=("There is no checkpoint yet: only curves are shown.",)
        )
    loaded, remarks = read_checkpoint(run, config, options, warn), list[str]()
    engine, routed = loaded.engine, route_rows(loaded.engine, loaded.batches, len(loaded.corpus.domains))
    size = model_size(engine.model)
    card = replace(
        card_of_run(run, config),
        domains=loaded.corpus.domains,
        step=loaded.step,
        parameters=size.total_parameters,
        active_parameters=size.active_parameters,
    )
    layers = _layers(loaded, routed, remarks)
    if (warning := evaluation_warning(engine.model.moe_layers())) is not None:
        remarks.append(warning)
    text, flows = _measured_text(loaded, routed), flow(config.model.moe_layers, routed.choices, loaded.num_experts)
    # Last of all: it loads other weights.
    checkpoints = compare_checkpoints(loaded, routed, options.max_checkpoints, remarks)
    return ReportData(
        card=card,
        text=text,
        layers=layers,
        flows=flows,
        checkpoints=checkpoints,
        remarks=tuple(remarks),
    )


def _measured_text(loaded: MeasuredRun, routed: Routed) -> MeasuredText:
    text, token_bytes = loaded.text, loaded.corpus.tokenizer.token_bytes()
    targets = np.concatenate([batch.targets[batch.target_mask > 0].numpy() for batch in loaded.batches])
    tokens = np.bincount(text.token_domain, minlength=len(text.domains))
    total = float(routed.loss_sum.sum())
    return MeasuredText(
        tokens=int(tokens.sum()),
        rows=len(text.tokens),
        domains=text.domains,
        domain_tokens=tuple(tokens.tolist()),
        domain_loss=tuple((routed.loss_sum / np.maximum(1, tokens)).tolist()),
        loss=total / max(1, int(tokens.sum())),
        bits_per_byte=total / math.log(2) / max(1, int(token_bytes[targets].sum())),
    )


def _layers(loaded: MeasuredRun, routed: Routed, remarks: list[str]) -> tuple[LayerFindings, ...]:
    """Return the findings on each layer."""
    moe, text = loaded.config.model.moe, loaded.text
    if moe is None:
        return ()
    shown, vocab_size = TokenText(loaded.corpus.tokenizer), loaded.corpus.tokenizer.vocab_size
    described = DescribedText.of(text, shown, vocab_size=vocab_size, num_layers=len(routed.choices))
    drops = None
    if moe.capacity.factor is not None:
        drops = count_drops(loaded.engine, loaded.batches, len(text.domains))
    inputs = _inputs_of_layers(loaded, remarks)
    found = []
    for n, (layer, module) in enumerate(
        zip(loaded.config.model.moe_layers, loaded.engine.model.moe_layers(), strict=True)
    ):
        choices, counts = routed.choices[n], loaded.counts(routed, n)
        load = counts.sum(0)
        bits, most = mutual_information_bits(counts.tolist()), domain_entropy_bits(counts.tolist())
        together = coactivation(choices, moe.num_experts)
        weights, outputs = weight_similarity(module.experts), compared_outputs(inputs[n], module.experts)
        found.append(
            LayerFindings(
                layer=layer,
                load=tuple((load / max(1, load.sum())).tolist()),
                load_imbalance=load_imbalance(load.astype(float)),
                domain_counts=as_matrix(counts),
                mutual_information=bits,
                mutual_information_share=bits / most if most else None,
                router_entropy=None if routed.entropy is None else routed.entropy[n],
                dead=tuple(np.flatnonzero(load == 0).tolist()),
                coactivation=None if together is None else as_matrix(together),
                weight_similarity=as_matrix(weights),
                output_similarity=as_matrix(outputs),
                duplicates=duplicates(weights, outputs),
                drops=None if drops is None else drop_rates(drops[n]),
                experts=describe_experts(described, choices, counts),
            )
        )
    return tuple(found)


def _inputs_of_layers(loaded: MeasuredRun, remarks: list[str]) -> list[torch.Tensor]:
    """Return the inputs of each layer for some tokens of all domains: of at most one batch of each."""
    firsts = {int(batch.domain[0, 0]): batch for batch in reversed(loaded.batches)}
    traces = trace_layers(loaded.engine.model, [firsts[domain] for domain in sorted(firsts)])
    spaced = []
    for trace in traces:
        keep = min(len(trace.x), _MOST_COMPARED)
        spaced.append(trace.x[torch.arange(keep, device=trace.x.device) * len(trace.x) // keep])
    if spaced and len(spaced[0]) < _MOST_COMPARED:
        remarks.append(f"Outputs of experts are compared on {len(spaced[0])} tokens only: there is no more text.")
    return spaced
