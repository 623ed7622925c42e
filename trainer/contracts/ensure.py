"""Failures of contract checks."""


class ContractError(AssertionError):
    """A plug-in breaks its contract; the message is what was found."""


def ensure(condition: object, found: str) -> None:
    """Fail a check, also under `python -O`.

    Args:
        condition: what must hold.
        found: what was found instead.

    Raises:
        ContractError: if it does not.
    """
    if not condition:
        raise ContractError(found)
