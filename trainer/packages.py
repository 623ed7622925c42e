"""Optional packages: whether one is installed, and the command that installs it. Imports none of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Final

from trainer.errors import ConfigError

_EXTRAS: Final = {
    "lm_eval": "lm-eval",
    "rouge_score": "text-metrics",
    "sacrebleu": "text-metrics",
    "scipy": "lab",
    "tensorboard": "tensorboard",
    "transformers": "hf",
    "triton": "triton",
}
"""Extra of pyproject.toml that installs a package; all others are installed with the project itself."""


_ARGUMENTS: Final = {
    "deep_ep": "git+https://github.com/deepseek-ai/DeepEP",
    "nccl": "'nccl-extensions[cu13]'",
    "scattermoe": "git+https://github.com/shawntan/scattermoe",
    # Its metadata asks for torch 2.9.1 or older, which pip would install.
    "sonicmoe": "quack-kernels && pip install --no-deps sonic-moe",
}
"""What `pip install` needs for a package that no extra has, if that is not its name."""


def is_installed(package: str) -> bool:
    """Return whether a top-level package can be found."""
    return find_spec(package) is not None


@contextmanager
def importing(package: str, *, user: str) -> Iterator[None]:
    """Explain how to install a package, by its top-level name, if the import in this context does not find it.

    The message starts with `user`: the key, option or feature that needs it.

    Raises:
        ConfigError: if the package, or a module that it needs, is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(missing(error.name or package, user=user, package=package)) from None


def missing(module: str, *, user: str, package: str = "") -> str:
    """Return the message about a missing module of a package, with the command that installs a fitting version."""
    package = package or module
    wanted = f"'turnout[{_EXTRAS[package]}]'" if package in _EXTRAS else _ARGUMENTS.get(package, package)
    return f"{user}: needs {module}, which is not installed; pip install {wanted}"
