"""A one-line fault and the tests that must catch it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A replacement in a file, and the tests that must fail with it."""

    name: str
    """Description of the fault."""
    file: str
    """Path from the root of the repository."""
    old: str
    """Exact text, which occurs once in the file."""
    new: str
    tests: tuple[str, ...]
    """Arguments of pytest: `file`, `file::test` or `file::test[case]`. At least one of their tests must fail."""

    def planted(self, root: Path) -> str | None:
        """Return the file's text with the fault; None unless the old text occurs exactly once."""
        text = (root / self.file).read_text()
        return text.replace(self.old, self.new) if text.count(self.old) == 1 else None


def in_package(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    """Return a fault in a file of the package; test paths are relative to tests/unit/ unless they name a folder."""
    folders = ("tests/contracts/", "tests/laws/", "tests/property/", "tests/unit/")
    paths = tuple(test if test.startswith(folders) else f"tests/unit/{test}" for test in tests)
    return Fault(name=name, file=f"trainer/{file}", old=old, new=new, tests=paths)
