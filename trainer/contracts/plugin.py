"""Find out what a plug-in is, make its config and check its contract."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from pydantic import ValidationError

from trainer.config.base import Config
from trainer.config.explain import explain
from trainer.config.nodes import Finding, Node, SourceLocation, report
from trainer.config.overrides import apply
from trainer.config.plugins import KindConfig, Pluggable, PluggableFunction, PluginError, load_object
from trainer.config.slots import Slot, plugins
from trainer.contracts import (
    dispatcher,
    experts_kernel,
    optimizer_and_schedule,
    router,
    source,
    task,
    tokenizer,
    tracker,
)
from trainer.data.sources.registry import SourceConfig
from trainer.data.tokenizers.registry import TokenizerConfig
from trainer.errors import ConfigError, TurnoutError
from trainer.evaluation.tasks.registry import AnyTaskConfig
from trainer.metrics.config import TrackerConfig
from trainer.moe.dispatch.registry import DispatcherConfig
from trainer.moe.routers.registry import RouterConfig
from trainer.optim.registry import OptimConfig, ScheduleConfig

Check = Callable[[Any], None]

_NUM_EXPERTS: Final = 4


class Contract(NamedTuple):
    """Checks of a kind of plug-in."""

    pluggable: Pluggable
    checks: Sequence[Check]


class Outcome(NamedTuple):
    """Result of one check."""

    name: str
    promise: str
    """What the check asks for, in a sentence."""
    error: str | None
    """What was found instead; None: the check passed."""


def _of_router(check: Callable[[Any, int], None]) -> Check:
    def run(config: Any) -> None:
        check(config, _NUM_EXPERTS)

    run.__name__, run.__doc__ = check.__name__, check.__doc__
    return run


def _contracts() -> list[Contract]:
    pairs: list[tuple[Any, Sequence[Check]]] = [
        (RouterConfig, [_of_router(check) for check in router.CHECKS]),
        (DispatcherConfig, dispatcher.CHECKS),
        (SourceConfig, source.CHECKS),
        (TokenizerConfig, tokenizer.CHECKS),
        (AnyTaskConfig, task.CHECKS),
        (TrackerConfig, tracker.CHECKS),
        (OptimConfig, optimizer_and_schedule.OPTIMIZER_CHECKS),
        (ScheduleConfig, optimizer_and_schedule.SCHEDULE_CHECKS),
    ]
    found = [(plugins(annotation), checks) for annotation, checks in pairs]
    return [Contract(pluggable, checks) for pluggable, checks in found if pluggable is not None]


def check_plugin(name: str, options: Sequence[str]) -> tuple[str, Iterator[Outcome]]:
    """Return the group of a plug-in, and the outcomes of its checks, which run as they are asked for.

    Args:
        name: module:Class, or module:function of an experts kernel; or a name that an installed package gives it.
        options: key=value, for the keys of its config.

    Raises:
        ConfigError: if it cannot be imported, is no plug-in, or its options are wrong.
    """
    kernels = PluggableFunction("experts_kernels")
    contracts = _contracts()
    try:
        for contract in contracts:
            if ":" not in name and contract.pluggable.has(name):
                return contract.pluggable.group, _outcomes(contract, contract.pluggable.section(name), name, options)
        found = load_object(name, alike=callable)
        for contract in contracts:
            if contract.pluggable.accepts(found):
                return contract.pluggable.group, _outcomes(contract, contract.pluggable.section(name), name, options)
        if isinstance(found, type):
            bases = ", ".join(f"{c.pluggable.base.__module__}.{c.pluggable.base.__name__}" for c in contracts)
            raise PluginError(f"{found.__name__} is not the config class of a plug-in; derive it from one of {bases}")
        function = kernels.function(name)
    except PluginError as error:
        raise ConfigError(f"{name}: {error}") from None
    if options:
        raise ConfigError(f"{name}: is a function, and has no options; leave out {' '.join(options)}")
    return kernels.group, (_run(check, function) for check in experts_kernel.CHECKS)


def _outcomes(contract: Contract, section: type[KindConfig], name: str, options: Sequence[str]) -> Iterator[Outcome]:
    config = _configured(section, name, options)
    return (_run(check, config) for check in contract.checks)


def _configured(section: type[KindConfig], name: str, options: Sequence[str]) -> Config:
    """Make the config of a plug-in.

    Raises:
        ConfigError: with a line for each option that is wrong.
    """
    findings: list[Finding] = []
    place = SourceLocation(0, 0, 0, name)
    tree = apply(Node({"kind": Node(name, place, place)}, place, place), options, Slot(section), findings)
    try:
        config = section.model_validate(tree.plain())
    except ValidationError as error:
        raise report([*findings, *explain(error, tree, section)]) from None
    if findings:
        raise report(findings)
    return config


def _run(check: Check, subject: Any) -> Outcome:
    promise, error = (check.__doc__ or "").strip().splitlines()[0], None
    try:
        check(subject)
    except (AssertionError, TurnoutError) as failure:
        error = str(failure).strip().partition("\n")[0] or type(failure).__name__
    except Exception as failure:
        frame = traceback.extract_tb(failure.__traceback__)[-1]
        error = f"{type(failure).__name__}: {failure} ({frame.filename}:{frame.lineno})"
    return Outcome(check.__name__, promise, error)
