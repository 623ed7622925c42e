"""Record the rows of a batch.

# B rows of S tokens, L MoE layers, k experts per token.
"""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from trainer.data.batches.assemble import PADDING
from trainer.data.batches.batch import Batch
from trainer.routing_record.record_writer import RecordWriter, RoutedSequence


def record_rows(
    writer: RecordWriter, batch: Batch, experts: Tensor, *, traced: Mapping[str, Tensor] | None = None
) -> None:
    """Record the real tokens of each row, and their experts (B, S, L, k), wherever they are; waits for the device.

    A token is learned if it is the target of the token before it. `traced` are the further tensors of a trace, (B, S,
    ...) by name.
    """
    further = {name: part.cpu().numpy() for name, part in (traced or {}).items()}
    ids, tokens, domains = (part.cpu().numpy() for part in (batch.sample_id, batch.tokens, batch.domain))
    valid, targets, chosen = (part.cpu().numpy() for part in (batch.valid, batch.target_mask > 0, experts))
    for row, real in enumerate(valid):
        if ids[row, 0] == PADDING or not real.any():
            continue
        writer.add(
            RoutedSequence(
                tokens=tokens[row][real],
                experts=chosen[row][real],
                is_learned=np.append(False, targets[row][real][:-1]),
                sample_id=int(ids[row, 0]),
                domain=int(domains[row, 0]),
                traced={name: part[row][real] for name, part in further.items()},
            )
        )
