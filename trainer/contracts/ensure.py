"""Failures of contract checks."""


class ContractError(AssertionError):
    """A plug-in breaks its contract; the message is what was found."""


def ensure(condition: object, found: str) -> None:
    """Raise ContractError with what was found unless the condition holds, also under `python -O`."""
    if not condition:
        raise ContractError(found)
