"""Frozen parameters: weights that have no gradient, no state of the optimizer and never change."""

from collections.abc import Iterable, Sequence

from torch import nn

from trainer.errors import ConfigError
from trainer.models.gpt import GPT
from trainer.models.parameter_patterns import check_selection, selected


def frozen_names(model: GPT, entries: Sequence[str]) -> list[str]:
    """Return the names of the parameters that the entries of `train.freeze` select.

    Raises:
        ConfigError: if an entry selects nothing, or nothing is left that learns.
    """
    parameters = dict(model.named_parameters())
    check_selection("train.freeze", entries, list(parameters), is_tied=model.head is None)
    frozen = [name for name in parameters if selected(entries, name)]
    if not any(p.requires_grad for name, p in parameters.items() if name not in frozen):
        what = "weight of the model" if model.config.lora is None else "adapter (model.lora)"
        exception = "!head" if model.config.lora is None else "!*.lora_*"
        raise ConfigError(
            f'train.freeze: every {what} is frozen, so nothing learns; add an exception, such as "{exception}"'
        )
    return frozen


def freeze_parameters(model: nn.Module, names: Iterable[str]) -> None:
    """Freeze parameters, by full name; before an engine is built, which looks at `requires_grad` only."""
    for name in names:
        model.get_parameter(name).requires_grad_(False)


def is_frozen(module: nn.Module) -> bool:
    """Return whether a module has parameters, all of which are frozen."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)
