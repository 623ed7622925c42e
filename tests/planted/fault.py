"""A fault of one line, and the tests that must notice it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What to write where, and who must fail then."""

    name: str
    """What is wrong, in words."""
    file: str
    """From the root of the repository."""
    old: str
    """Exact text, which occurs in the file once."""
    new: str
    tests: tuple[str, ...]
    """Arguments of pytest: `file`, `file::test` or `file::test[case]`. At least one of their tests must fail."""

    def planted(self, root: Path) -> str | None:
        """Return the file's text with the fault in it; None if the old text is not there once."""
        text = (root / self.file).read_text()
        return text.replace(self.old, self.new) if text.count(self.old) == 1 else None


def in_package(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    """Return a fault in a file of the package, whose tests are files of tests/unit/ unless they name their folder."""
    folders = ("tests/contracts/", "tests/laws/", "tests/property/", "tests/unit/")
    paths = tuple(test if test.startswith(folders) else f"tests/unit/{test}" for test in tests)
    return Fault(name=name, file=f"trainer/{file}", old=old, new=new, tests=paths)
