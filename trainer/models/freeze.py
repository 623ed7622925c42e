"""What learns, and how fast: frozen parameters have no gradient, no state of the optimizer and never change."""

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from trainer.errors import ConfigError
from trainer.models.gpt import GPT
from trainer.models.parameter_patterns import TIED, TWICE, check_matches, check_selection, factor_of, matches, selected


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


def rate_factors(model: GPT, factors: Mapping[str, float]) -> dict[str, float]:
    """Return the factor of the learning rate of each parameter that learns, by `train.lr_scale`."""
    return {name: factor_of(factors, name) for name, p in model.named_parameters() if p.requires_grad}


def check_rate_factors(model: GPT, factors: Mapping[str, float]) -> None:
    """Check `train.lr_scale` against the whole model.

    Raises:
        ConfigError: if an entry matches nothing that learns.
    """
    learning = {name: p.requires_grad for name, p in model.named_parameters()}
    check_matches("train.lr_scale", factors, list(learning), is_tied=model.head is None)
    by_any_name = dict(learning)
    if model.head is None:
        for embedding, head in TIED.items():
            by_any_name[head] = learning[embedding]
            first, second = factor_of(factors, embedding), factor_of(factors, head)
            if first != second:
                given = f"{embedding} has {first:g} and {head} {second:g}"
                raise ConfigError(f"train.lr_scale: {given}, and both are one weight: {TWICE}")
    for entry in (entry for entry, factor in factors.items() if factor != 1):
        if not any(learns and matches(entry, name) for name, learns in by_any_name.items()):
            raise ConfigError(f"train.lr_scale: {entry} matches only weights that train.freeze freezes; make it 1")


def frozen_router_warning(model: GPT) -> str | None:
    """Return a warning if losses are on that are for the routers' sake, and every router is frozen; else None.

    Their gradients go on to the weights below, which then learn to give tokens that the routers spread evenly.
    """
    moe, layers = model.config.moe, model.moe_layers()
    if moe is None or not layers or not all(is_frozen(layer.router) for layer in layers):
        return None
    names = [f"{term.name}_loss" for term in moe.aux_losses.terms() if term.name not in ("router", "diversity")]
    if not names:
        return None
    parameters = list(model.named_parameters())
    last = max(at for at, (name, _) in enumerate(parameters) if "router" in name.split("."))
    does = "changes the weights below them instead"
    if not any(p.requires_grad for _, p in parameters[:last]):
        does = "reaches nothing that learns"
    key, more = (
        ("train.freeze", "") if model.config.lora is None else ("model.lora", ", or model.lora.trains: [router]")
    )
    return (
        f"{key}: every router is frozen, and the gradient of {' and '.join(names)} {does}; set the coefficients to 0 "
        f"in model.moe{more} if that is not meant"
    )
