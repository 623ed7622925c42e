"""Outcomes of contract checks other than success."""


class ContractError(AssertionError):
    """A plug-in breaks its contract; the message is what was found."""


class DoesNotApply(Exception):
    """A check does not apply to this plug-in."""


def ensure(condition: object, found: str) -> None:
    """Raise ContractError with what was found unless the condition holds, also under `python -O`."""
    if not condition:
        raise ContractError(found)
