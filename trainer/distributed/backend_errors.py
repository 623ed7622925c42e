"""Errors of the libraries that communicate: which they are, and their reasons in short."""

import re

import torch.distributed as dist

from trainer.errors import first_line


def is_collective_error(error: BaseException) -> bool:
    """Return whether an error comes from a collective that a library issues itself, as FSDP and DeepSpeed do."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def backend_reason(error: BaseException) -> str:
    """Return the backend's error message, without its source line and advice."""
    first = first_line(error).partition(" This is typically")[0]
    return re.sub(r"^\[\S*?:\d+\] ", "", first)
