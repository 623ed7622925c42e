"""Evaluate a traced run again at other capacities and k, which tells what later MoE layers decide there.

# B rows of S tokens, T = B * S, L MoE layers, k experts per token.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from trainer.checkpoint.choice import CheckpointChoice
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.nodes import shown_path
from trainer.console.console import Console
from trainer.data.batches.batch import Batch
from trainer.data.batches.evaluation import batches_of_all_domains
from trainer.data.corpus import Corpus
from trainer.engine.base import Engine
from trainer.errors import DataError
from trainer.experiment import ExperimentConfig
from trainer.moe.capacity import limit_to_capacity
from trainer.moe.layer_options import CapacityConfig
from trainer.moe.routing import RoutingDecision, RoutingOptions
from trainer.training.load_trained import load_trained
from trainer.training.run_text import corpus_of_run
from trainer.what_if.predicted_decision import DecidedPass
from trainer.what_if.traced_passes import Trace, TracedPass


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOfTrace:
    """The run that a trace is of, and which of its weights."""

    config: ExperimentConfig
    folder: RunFolder
    choice: CheckpointChoice

    def load(self, trace: Trace) -> "EvaluatedRun":
        """Load the weights and the text.

        Raises:
            CheckpointError: if there are no such weights.
            DataError: if the trace is of other text or weights.
        """
        console = Console(file=sys.stderr)
        engine, tokenizer, _ = load_trained(self.config, self.folder, self.choice, warn=console.warning)
        with console.progress_bar("reading text") as bar:
            corpus = corpus_of_run(self.config, self.folder, tokenizer, progress=bar)
        return EvaluatedRun(trace, self.config, engine, corpus)


class EvaluatedRun:
    """The model and the text of a trace, in this process."""

    def __init__(self, trace: Trace, config: ExperimentConfig, engine: Engine, corpus: Corpus) -> None:
        """Compare the model with the trace: in its first pass all layers must choose the same experts.

        Raises:
            DataError: if they do not, or the text is another one.
        """
        self._trace, self._packing, self._engine = trace, config.data.packing, engine
        self._corpus = replace(corpus, validation=corpus.train) if trace.facts.split == "train" else corpus
        first = next(self.passes(top_k=trace.model.top_k, capacity=CapacityConfig()))
        for layer in range(len(first.decisions)):
            self._check_layer(first, layer, trace.model.top_k)

    def passes(self, *, top_k: int, capacity: CapacityConfig) -> Iterator[DecidedPass]:
        """Yield what an evaluation at a capacity and a k decides.

        Raises:
            DataError: if the trace is of other text or weights.
        """
        own = self._trace.model.top_k
        options = RoutingOptions(
            top_k=None if top_k == own else top_k, counts_targets_only=True, return_router_outputs=True
        )
        for traced, batch in zip(self._trace.passes(), self._batches(), strict=True):
            self._check_text(traced, batch)
            with torch.no_grad(), self._engine.autocast(), self._limited(capacity):
                stats = self._engine.model(batch.to(self._engine.device), options).moe
            routed = [one.routed.decision for one in stats if one.routed is not None]
            layers = zip(routed, self._trace.model.moe_layers, strict=True)
            decided = DecidedPass(
                traced=traced,
                decisions=[limit_to_capacity(_on_host(d), capacity, traced.context, salt=layer) for d, layer in layers],
            )
            self._check_layer(decided, 0, top_k)
            yield decided

    def _batches(self) -> Iterator[Batch]:
        """Yield the text of the trace, in the passes that it was read in."""
        facts, rows = self._trace.facts, np.bincount(self._trace.record.index.domain)
        return batches_of_all_domains(
            self._corpus,
            packing=self._packing,
            seq_len=facts.row_length,
            batch_size=facts.rows_per_pass,
            max_tokens=int(rows.max()) * facts.row_length,  # of shorter domains the trace has all
        )

    @contextmanager
    def _limited(self, capacity: CapacityConfig) -> Iterator[None]:
        """Give a capacity to all layers, and theirs back at the end."""
        layers = self._engine.model.moe_layers()
        before = [layer.capacity for layer in layers]
        try:
            for layer in layers:
                layer.capacity = capacity
            yield
        finally:
            for layer, own in zip(layers, before, strict=True):
                layer.capacity = own

    def _check_text(self, traced: TracedPass, batch: Batch) -> None:
        context, valid = traced.context, batch.valid.flatten()
        is_same = torch.equal(context.valid, valid) and torch.equal(context.token_ids, batch.tokens.flatten() * valid)
        if not is_same:
            self._refuse("the run reads other text than the trace has", "trace it again")

    def _check_layer(self, decided: DecidedPass, layer: int, top_k: int) -> None:
        valid = decided.traced.context.valid
        chosen = decided.decisions[layer].expert_index.view(len(valid), top_k)[valid]
        if not torch.equal(chosen, decided.traced.listed[:, layer, :top_k][valid]):
            what = f"MoE layer {self._trace.model.moe_layers[layer]} chooses other experts than the trace has"
            self._refuse(
                f"{what}, which was made by {self._trace.record.manifest.made_by}", "name its weights (--step)"
            )

    def _refuse(self, what: str, remedy: str) -> None:
        raise DataError(f"--run: {what} ({shown_path(self._trace.record.folder)}); {remedy}")


def _on_host(decision: RoutingDecision) -> RoutingDecision:
    names = ("token_index", "expert_index", "combine_weight", "kept")
    return replace(decision, **{name: getattr(decision, name).cpu() for name in names})
