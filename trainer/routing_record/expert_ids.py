"""Check the experts of a sequence: that all of a token's exist, and that they differ.

# n tokens of a sequence, L MoE layers, k experts per token.
"""

import numpy as np
from numpy.typing import NDArray

from trainer.routing_record.record_manifest import ModelFacts


def unknown_expert(experts: NDArray[np.integer], model: ModelFacts) -> str | None:
    """Return where the first expert (n, L, k) is that the model does not have; None if it has all."""
    wrong = (experts < 0) | (experts >= model.num_choices)
    if not wrong.any():
        return None
    token, layer, slot = np.argwhere(wrong)[0].tolist()
    expert = int(experts[token, layer, slot])
    return f"token {token}, layer {model.moe_layers[layer]}: expert {expert}, and there are {model.num_choices}"


def repeated_expert(experts: NDArray[np.integer], model: ModelFacts) -> str | None:
    """Return where the first token is that has one of its experts (n, L, k) twice; None if there is none."""
    ordered = np.sort(experts, axis=-1)
    repeated = (ordered[..., 1:] == ordered[..., :-1]).any(-1)
    if not repeated.any():
        return None
    token, layer = np.argwhere(repeated)[0].tolist()
    twice = experts[token, layer].tolist()
    where = f"token {token}, layer {model.moe_layers[layer]}"
    return f"{where}: has an expert twice ({twice}), as where an engine has recorded nothing"
