"""Whether a tensor is sharded, without the import of torch.distributed.tensor that half a second goes into."""

import sys
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_sharded(tensor: Tensor) -> "TypeIs[DTensor]":
    """Return whether this rank holds only a shard of the tensor."""
    module = sys.modules.get("torch.distributed.tensor")  # nobody has made such a tensor unless it is imported
    return module is not None and isinstance(tensor, module.DTensor)
