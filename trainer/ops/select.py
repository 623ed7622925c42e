"""Selection with a defined answer where scores are equal."""

from torch import Tensor


def first_top_k(scores: Tensor, k: int) -> Tensor:
    """Return (T, k) int64 columns of the k largest scores of each row, best first; equal scores in column order.

    `torch.topk` leaves the order of equal scores open (it returned columns 6 and 5 of eight equal ones), and a tie that
    breaks differently on another layout changes what is learned. A stable sort breaks it the same way everywhere.

    Args:
        scores: (T, E).
        k: 1 to E.
    """
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
