"""Version of Turnout. Imports no torch."""

from importlib import metadata


def turnout_version() -> str | None:
    """Return the installed version; None if the package is not installed."""
    try:
        return metadata.version("turnout")
    except metadata.PackageNotFoundError:
        return None
