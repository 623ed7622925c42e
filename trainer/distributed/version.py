"""The version of Turnout that runs here. Imports no torch."""

from importlib import metadata


def turnout_version() -> str | None:
    """Return the version that pip knows; None where the code runs without having been installed."""
    try:
        return metadata.version("turnout")
    except metadata.PackageNotFoundError:
        return None
