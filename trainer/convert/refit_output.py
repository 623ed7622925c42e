"""Fit the last matrix of a merged expert to what its group computes on a text.

# T tokens, m experts of the group, D d_model, F hidden units.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from trainer.convert.hidden_units import HiddenUnits
from trainer.convert.layer_traces import LayerTrace
from trainer.moe.experts import Experts
from trainer.ops.expert_ffn import activate

_RIDGE = 0.01  # of the mean square of a hidden value: keeps what few tokens leave undetermined


@torch.no_grad()
def refit_output(merged: HiddenUnits, group: Sequence[int], trace: LayerTrace, experts: Experts) -> HiddenUnits:
    """Return the merged expert with the w_out that is nearest to the weighted sum of its group, by ridge regression.

    The mean of experts that differ is smaller than each of them, and this makes up for it. A token counts by the sum of
    the combine weights that it gives to the group, with which the merged expert will be weighted.
    """
    weight = trace.weight[:, list(group)]  # (T, m)
    visits = weight.sum(1) > 0
    x, weight = trace.x[visits], weight[visits]
    if not len(x):
        return merged
    index = torch.tensor(list(group), device=x.device).expand(len(x), -1).contiguous()
    target = experts(x, index, weight).double()  # (T, D)
    total = weight.sum(1, keepdim=True).double()
    hidden = activate(F.linear(x, merged.w_in, merged.w_in_bias), experts.activation).double() * total  # (T, F)
    bias = 0 if merged.w_out_bias is None else merged.w_out_bias.double() * total
    left = target - bias - hidden @ merged.w_out.double().T
    products = hidden.T @ hidden
    products.diagonal().add_(_RIDGE * products.diagonal().mean())
    change = torch.linalg.solve(products, hidden.T @ left).T  # (D, F)
    return replace(merged, w_out=(merged.w_out.double() + change).to(merged.w_out))
