"""The seam of tensor parallelism: what a block does where its matrices are cut over ranks (arXiv 2205.05198).

    part of each row -> norm -> gathered -> columns of heads, or of hidden units -> rows of out -> reduced -> part of
                                each row

Between blocks, and in norms, routers and experts, a rank has its part of each row; between `gathered` and `reduced` it
has all tokens of the ranks, for its own heads or hidden units.

# B rows, S tokens in a part of a row, n ranks, D width.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from trainer.models.lora import product
from trainer.models.parameter_roles import factor_names
from trainer.models.recompute import checkpointed
from trainer.ops.cut import Cut


class TokenExchange(Protocol):
    """Exchange of tokens between the ranks that hold a block's matrices together.

    If rows are whole, `is_part` is false: all ranks have the same ones, which are not gathered.
    """

    def gathered(self, x: Tensor, *, is_part: bool) -> Tensor:
        """Return the tokens (B, n S, D) of all ranks in the order of the row, from those here (B, S, D)."""
        ...

    def reduced(self, y: Tensor, *, is_part: bool) -> Tensor:
        """Return the sums over ranks (B, S, D) of the tokens here, from this rank's share (B, n S, D) for all."""
        ...

    def whole_heads(self, x: Tensor, *, num_queries: int) -> Tensor:
        """Return queries, keys and values (B, S, .) in which keys and values that ranks share are whole.

        The first `num_queries` columns of x are queries; the others are this rank's part of a head's keys and values,
        or whole heads that it has alone.
        """
        ...


def project_in(linear: nn.Linear, x: Tensor, exchange: TokenExchange | None, *, is_part: bool) -> Tensor:
    """Apply a projection, or the rows of it that are here, to the tokens of all ranks.

    These are gathered again in the backward pass, so that only the part that is here is kept for it.
    """
    if exchange is None:
        return linear(x)
    return checkpointed(lambda x: linear(exchange.gathered(x, is_part=is_part)), x, recompute=is_part)


def project_out(linear: nn.Linear, y: Tensor, exchange: TokenExchange | None, *, is_part: bool) -> Tensor:
    """Apply a projection, or the columns of it that are here, and sum over ranks; a bias is added once, to the sum."""
    if exchange is None:
        return linear(y)
    out = exchange.reduced(product(linear, y), is_part=is_part)
    return out if linear.bias is None else out + linear.bias


def with_adapters(module: nn.Module, cuts: Mapping[str, Cut]) -> dict[str, Cut]:
    """Return cuts of weights with those of their adapters: rows of W are rows of B, columns those of A (`model.lora`).

    The other factor is whole: it sees all tokens of the ranks, for the heads or hidden units here, so that its gradient
    is a partial sum on every rank.
    """
    there, found = {name for name, _ in module.named_parameters()}, dict(cuts)
    for name, cut in cuts.items():
        of_columns, of_rows = factor_names(name)
        factor = of_columns if cut.dim else of_rows
        if factor in there:
            found[factor] = cut
    return found


def keep_cuts(module: nn.Module, cuts: Mapping[str, Cut]) -> None:
    """Keep only cuts of some parameters of a module, by their names in it."""
    for name, cut in cuts.items():
        owner, _, own = name.rpartition(".")
        weight = module.get_parameter(name)
        kept = nn.Parameter(cut.of(weight.detach()), weight.requires_grad)
        setattr(module.get_submodule(owner), own, kept)
