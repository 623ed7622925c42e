"""Read and validate the environment variables of launchers. Imports no torch.

Users rarely see these variables, so errors name the variable, its value and what is allowed.
"""

import importlib
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trainer import fault_injection
from trainer.errors import ConfigError, first_line

SUPERVISOR = "TURNOUT_SUPERVISOR"
"""Environment variable: process id of the supervisor."""
_MAX_RANKS, _MAX_DIGITS, _MAX_SHOWN = 1 << 20, 18, 40
_OPENMP = re.compile(r"\s*[1-9]\d{0,4}\s*(,\s*[1-9]\d{0,4}\s*)*", re.ASCII)
_INTERFACES = "GLOO_SOCKET_IFNAME"
_READ_BY_TORCH = ("TORCH_LOGS", "TORCH_DISTRIBUTED_DEBUG")
"""Variables that torch reads on import, which fails if they are invalid."""


@dataclass(slots=True)
class Variables:
    """Reads values and collects problems."""

    environment: Mapping[str, str]
    problems: list[str] = field(default_factory=list)

    def number(
        self,
        name: str,
        *,
        least: int,
        most: int | None = None,
        default: int | None = 0,
        option: str | None = None,
        note: str = "",
    ) -> int:
        """Return a number; the default (or `least`) if it is unset, empty or invalid.

        Args:
            name: of the variable.
            least: smallest allowed value.
            most: largest allowed value; None for any.
            default: None if a value is required.
            option: value of the command-line option, which overrides the variable; None if not given.
            note: appended to the message.
        """
        text = self.environment.get(name, "") if option is None else option
        if option is None and not text and default is not None:
            return default
        is_number = text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS
        if is_number and least <= int(text) and (most is None or int(text) <= most):
            return int(text)
        allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
        if len(text) > _MAX_SHOWN:
            text = f"{text[:_MAX_SHOWN]}..."
        source = f"{name}=" if option is None else f"--{name.lower().replace('_', '-')} "
        what = f"{source}{text}: is not" if text or option is not None else f"{name}: is not set; use"
        self.problems.append(f"{what} a number {allowed}{note}")
        return least if default is None else default

    def check(self) -> None:
        """Raise a ConfigError with one line for each problem found.

        It is printed by every rank, since the rank number itself may be wrong.
        """
        if self.problems:
            error = ConfigError("\n".join(self.problems))
            error.is_rank_specific = True
            raise error


def world_size_and_rank(collected: Variables | None = None) -> tuple[int, int]:
    """Return (world size, rank); (1, 0) without a launcher.

    A ConfigError names each invalid variable, unless they are to be `collected`.
    """
    variables, note = collected or Variables(os.environ), "; launch and torchrun set it"
    world_size = variables.number("WORLD_SIZE", least=1, most=_MAX_RANKS, default=1, note=note)
    most = None if variables.problems else world_size - 1
    if variables.environment.get("WORLD_SIZE"):
        note = f" (WORLD_SIZE={world_size}){note}"
    else:
        note = ": WORLD_SIZE is not set, so there is one rank; launch and torchrun set both"
    rank = variables.number("RANK", least=0, most=most, note=note)
    if collected is None:
        variables.check()
    return world_size, rank


def local_size_and_rank(collected: Variables | None = None, most: int | None = None) -> tuple[int | None, int]:
    """Return (number of ranks on this node, at `most` so many, local rank); the number is None if unknown.

    A ConfigError names each invalid variable, unless they are to be `collected`.
    """
    variables, note = collected or Variables(os.environ), "; launch and torchrun set it"
    name = "LOCAL_WORLD_SIZE" if variables.environment.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE"  # DeepSpeed's launcher
    here = variables.number(name, least=1, most=most, note=note)
    local_rank = variables.number("LOCAL_RANK", least=0, most=here - 1 if here else None, note=note)
    if collected is None:
        variables.check()
    return here or None, local_rank


def is_first(name: str) -> bool:
    """Return whether RANK or LOCAL_RANK is 0, or not a number."""
    text = os.environ.get(name, "")
    return not (text.isascii() and text.isdigit() and text.strip("0"))


def is_restarted() -> bool:
    """Return whether torchrun has started this rank before."""
    text = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return text.isascii() and text.isdigit() and int(text) > 0


def check_process_variables() -> None:
    """Check the variables of any process; a ConfigError names each invalid one."""
    variables = Variables(os.environ)
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads and not _OPENMP.fullmatch(threads):
        problem = f"OMP_NUM_THREADS={threads}: is not a number of at least 1, nor a list of such numbers"
        variables.problems.append(problem)
    variables.problems += _refused_by_torch()
    try:
        fault_injection.parse_faults(os.environ.get("TURNOUT_FAULTS", ""), "0")
    except ValueError as error:
        variables.problems.append(str(error))
    variables.check()


def check_rank_variables() -> None:
    """Check the variables of a rank; a ConfigError names each invalid one."""
    variables = Variables(os.environ)
    variables.number(SUPERVISOR, least=1, most=(1 << 31) - 1, note=": launch sets it; unset it")
    world_size, _ = world_size_and_rank(variables)
    is_known = not variables.problems
    local_size_and_rank(variables, world_size if is_known and os.environ.get("WORLD_SIZE") else None)
    variables.number("MASTER_PORT", least=1, most=65535)
    if world_size > 1:
        variables.problems += unknown_interfaces(os.environ)
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing and not variables.problems:
            variables.problems.append(
                f"WORLD_SIZE={world_size} needs {', '.join(missing)} as well; launch and torchrun set all of them"
            )
    variables.check()


def _refused_by_torch() -> Sequence[str]:
    """Return a problem if torch cannot be imported because of these variables; try only if one is set."""
    given = [f"{name}={os.environ[name]}" for name in _READ_BY_TORCH if os.environ.get(name)]
    try:
        if given:
            importlib.import_module("torch.distributed")
    except (ValueError, RuntimeError) as error:
        return [f"{' '.join(given)}: torch cannot be imported with it: {first_line(error)}; correct it, or unset it"]
    return []


def unknown_interfaces(environment: Mapping[str, str]) -> Sequence[str]:
    """Return a problem for each unknown interface in GLOO_SOCKET_IFNAME; NCCL's variable has a syntax of its own."""
    names = environment.get(_INTERFACES, "")
    known = [name for _, name in socket.if_nameindex()]
    unknown = [name for name in filter(None, names.split(",")) if name not in known]
    return [f"{_INTERFACES}={names}: {name} is not an interface here; use {', '.join(known)}" for name in unknown]
