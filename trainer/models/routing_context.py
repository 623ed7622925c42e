"""Build the context of a micro-batch that routers see."""

import torch

from trainer.data.batches.batch import Batch
from trainer.moe.routing import RoutingContext, RoutingOptions, RowParts
from trainer.ops.noise import token_keys


def routing_context(batch: Batch, options: RoutingOptions, row_parts: RowParts | None = None) -> RoutingContext:
    """Return the routers' context for a micro-batch; `row_parts` shows the rest of rows that it has parts of."""
    num_sequences, S = batch.tokens.shape
    seed = options.noise_seed
    keys = None if seed is None else token_keys(seed, batch.sample_id, batch.position).flatten()
    return RoutingContext(
        token_ids=batch.tokens.flatten(),
        valid=batch.valid.flatten(),
        position=batch.position.flatten(),
        sequence_index=torch.arange(num_sequences, device=batch.tokens.device).repeat_interleave(S),
        num_sequences=num_sequences,
        num_valid=batch.num_valid,
        noise_key=keys,
        top_k=options.top_k,
        dropless=options.dropless,
        counted=batch.target_mask.flatten() if options.counts_targets_only else None,
        return_router_outputs=options.return_router_outputs,
        return_experts=options.return_experts,
        replayed=None if batch.experts is None else batch.experts.flatten(0, 1),
        row_parts=None if batch.row_document_id is None else row_parts,
    )
