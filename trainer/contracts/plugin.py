"""Find out what a plug-in is, make its config and check its contract."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from trainer.config.loader import validate
from trainer.config.nodes import Finding, Node, SourceLocation
from trainer.config.overrides import apply
from trainer.config.plugins import KindConfig, Pluggable, PluggableFunction, PluginError, kinds, load_object
from trainer.config.slots import Slot, plugins, sections
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
from trainer.contracts.build import build_returns_its_kind
from trainer.contracts.ensure import DoesNotApply
from trainer.data.sources.registry import SourceConfig
from trainer.data.tokenizers.registry import TokenizerConfig
from trainer.errors import ConfigError, TurnoutError
from trainer.evaluation.tasks.registry import AnyTaskConfig
from trainer.metrics.config import TrackerConfig
from trainer.moe.dispatch.registry import DispatcherConfig
from trainer.moe.routers.config.options import RouterOptions
from trainer.moe.routers.registry import RouterConfig
from trainer.optim.registry import OptimConfig, ScheduleConfig

Check = Callable[..., None]
Contract = tuple[Pluggable, Sequence[Check]]
"""A kind of plug-in, and its checks."""

_NUM_EXPERTS: Final = 4
_CONTRACTS: Final[Sequence[tuple[Any, Sequence[Check]]]] = [
    (RouterConfig, router.CHECKS),
    (DispatcherConfig, dispatcher.CHECKS),
    (SourceConfig, source.CHECKS),
    (TokenizerConfig, tokenizer.CHECKS),
    (AnyTaskConfig, task.CHECKS),
    (TrackerConfig, tracker.CHECKS),
    (OptimConfig, optimizer_and_schedule.OPTIMIZER_CHECKS),
    (ScheduleConfig, optimizer_and_schedule.SCHEDULE_CHECKS),
]
"""Annotation of the section of each kind of plug-in, and its checks."""


class Outcome(NamedTuple):
    """Result of one check: its name, what it asks for in a sentence, and what was found instead if it failed."""

    name: str
    promise: str
    error: str | None
    is_skipped: bool = False
    """The check does not apply."""


def _contracts() -> list[Contract]:
    return [(pluggable, checks) for annotation, checks in _CONTRACTS if (pluggable := plugins(annotation)) is not None]


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
        for pluggable, checks in contracts:
            if ":" not in name and pluggable.has(name):
                return pluggable.group, _outcomes(checks, pluggable.section(name), name, options)
        if any(name in kinds(section) for annotation, _ in _CONTRACTS for section in sections(annotation)):
            raise PluginError("is built in; name a plug-in, my_package.module:ClassConfig")
        found = load_object(name, alike=callable)
        for pluggable, checks in contracts:
            if pluggable.accepts(found):
                return pluggable.group, _outcomes(checks, pluggable.section(name), name, options)
        if any(found is pluggable.base for pluggable, _ in contracts):
            raise PluginError(f"{found.__name__} is the base class of such plug-ins; derive one from it")
        if isinstance(found, type):
            bases = ", ".join(f"{p.base.__module__}.{p.base.__name__}" for p, _ in contracts)
            raise PluginError(f"{found.__name__} is not the config class of a plug-in; derive it from one of {bases}")
        if not callable(found):
            raise PluginError(f"is a {type(found).__name__}; name a config class, or the function of an experts kernel")
        function = kernels.function(name)
    except PluginError as error:
        raise ConfigError(f"{name}: {error}") from None
    if options:
        raise ConfigError(f"{name}: is a function, and has no options; leave out {' '.join(options)}")
    return kernels.group, (_run(check, function) for check in experts_kernel.CHECKS)


def _outcomes(
    checks: Sequence[Check], section: type[KindConfig], name: str, options: Sequence[str]
) -> Iterator[Outcome]:
    """Make the config of a plug-in; return the outcomes of its checks.

    Raises:
        ConfigError: with a line for each option that is wrong.
    """
    findings: list[Finding] = []
    place = SourceLocation(0, 0, 0, name)
    tree = apply(Node({"kind": Node(name, place, place)}, place, place), options, Slot(section), findings)
    config = validate(tree, section, findings)
    subject = (config, _NUM_EXPERTS) if isinstance(config, RouterOptions) else (config,)
    return _run_all(checks, *subject)


def _run_all(checks: Sequence[Check], *subject: Any) -> Iterator[Outcome]:
    """Run the checks if the plug-in can be built at all."""
    yield (first := _run(build_returns_its_kind, *subject))
    if first.error is None:
        yield from (_run(check, *subject) for check in checks)


def _run(check: Check, *subject: Any) -> Outcome:
    promise, error = (check.__doc__ or "").strip().splitlines()[0], None
    try:
        check(*subject)
    except DoesNotApply:
        return Outcome(check.__name__, promise, None, is_skipped=True)
    except (AssertionError, TurnoutError) as failure:
        error = str(failure).strip().partition("\n")[0] or type(failure).__name__
    except Exception as failure:
        frame = traceback.extract_tb(failure.__traceback__)[-1]
        error = f"{type(failure).__name__}: {failure} ({frame.filename}:{frame.lineno})"
    return Outcome(check.__name__, promise, error)
