"""Text that every machine with Turnout has: three domains of real text, without a download.

The documents depend on the Python patch version and the torch version. A file is one document in each domain that it
has text for; no text is in two domains.
"""

import ast
import hashlib
import importlib.util
import os
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from trainer.data.records.base import SourcePart
from trainer.data.records.text_files import readable
from trainer.data.sources.base import Document, Source
from trainer.errors import DataError

MIN_DOCSTRING_CHARACTERS = 60  # docstrings up to this length are labels rather than prose and are left out

# The first set holds tests, tables and generated code, not text written by people. The folders of the second
# are missing from some Linux distributions or newer Pythons, on which the corpus must not depend.
_GENERATED = {"test", "tests", "idle_test", "encodings", "pydoc_data", "__phello__", "__pycache__"}
_UNSTABLE = {"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo", "site-packages", "dist-packages"}
_EXCLUDED_PREFIXES = (".", "_sysconfigdata", "config-", "sitecustomize")  # hidden, or written for one machine

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class SeparatedModule(NamedTuple):
    """A Python module, separated into code and docstrings."""

    code: str  # still a valid module
    docstrings: list[str]  # in order of appearance, indentation removed


class InstalledSource(Source):
    """Python's standard library (`python`), its documentation (`english`) and torch's C++ headers (`cpp`)."""

    def __init__(self, domains: Iterable[str], *, weight: float = 1.0) -> None:
        self.weight = weight
        self._domains = frozenset(domains)

    def files(self) -> list[Path]:
        """Return the files of the chosen domains, sorted by their path in the library."""
        library = _library() if self._domains & {"python", "english"} else []
        topics = [_topics_file()] if "english" in self._domains else []
        headers = _headers() if "cpp" in self._domains else []
        return [*(path for _, path in library), *topics, *(path for _, path in headers)]

    def parts(self) -> list[SourcePart]:
        """Return a single part: repeated texts are found by reading everything."""
        return [SourcePart(size_bytes=sum(path.stat().st_size for path in self.files()))]

    def read(self, part: SourcePart) -> Iterator[Document]:
        """Yield the code and docstrings of modules, the topics of Python's manual, and headers.

        Texts repeated in a domain (licences, stubs) are yielded once.
        """
        seen: set[bytes] = set()
        for document in self._all_documents():
            digest = hashlib.sha256(f"{document.domain}\n{document.text}".encode()).digest()
            if document.text.strip() and digest not in seen:
                seen.add(digest)
                yield document

    def _all_documents(self) -> Iterator[Document]:
        if self._domains & {"python", "english"}:
            for name, path in _library():
                yield from self._module_documents(name, path)
        if "english" in self._domains:
            _topics_file()
            topics: dict[str, str] = import_module("pydoc_data.topics").topics
            for name in sorted(topics):
                yield Document(name=f"topics/{name}", domain="english", text=topics[name].strip("\n") + "\n")
        if "cpp" in self._domains:
            for name, path in _headers():
                with readable(path):
                    # All known headers are UTF-8; a future one that is not must not break the default config.
                    yield Document(name=name, domain="cpp", text=path.read_bytes().decode("utf-8", errors="replace"))

    def _module_documents(self, name: str, path: Path) -> Iterator[Document]:
        try:
            with readable(path), tokenize.open(path) as file:
                module = separate(file.read())
        except (SyntaxError, ValueError):
            return  # a template, or the syntax of another version
        if "python" in self._domains:
            yield Document(name=name, domain="python", text=module.code)
        prose = [text for text in module.docstrings if len(text) > MIN_DOCSTRING_CHARACTERS]
        if "english" in self._domains and prose:
            yield Document(name=name, domain="english", text="\n\n".join(prose) + "\n")


def separate(source: str) -> SeparatedModule:
    """Separate a module's docstrings from its code; raise SyntaxError if it is not a Python module."""
    lines = source.encode().splitlines(keepends=True)  # the syntax tree counts columns in UTF-8 bytes
    found: list[tuple[int, str]] = []
    for node in _statements(ast.parse(source)):
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)) is not None:
            _remove(lines, node.body[0], alone=len(node.body) == 1 and not isinstance(node, ast.Module))
            found.append((node.body[0].lineno, text))
    return SeparatedModule(b"".join(lines).decode(), [text for _, text in sorted(found)])


def _statements(module: ast.Module) -> list[ast.AST]:
    """Return the module and all statements in it; ast.walk also visits expressions and takes twice as long."""
    nodes: list[ast.AST] = [module]
    for node in nodes:  # grows during the loop
        for part in ("body", "orelse", "finalbody", "handlers", "cases"):
            nodes += getattr(node, part, ())
    return nodes


def _remove(lines: list[bytes], docstring: ast.stmt, *, alone: bool) -> None:
    """Remove a docstring from the lines in place; line numbers stay valid for the next one."""
    assert docstring.end_lineno is not None and docstring.end_col_offset is not None, "ast.parse gives every end"
    first, last = docstring.lineno - 1, docstring.end_lineno - 1
    before, after = lines[first][: docstring.col_offset], lines[last][docstring.end_col_offset :]
    # `def f(): "text"` and `"text"; x = 1` need a statement where the docstring was.
    if alone or before.strip() or after.strip()[:1] not in (b"", b"#"):
        lines[first] = before + b"..." + after
    else:
        lines[first] = before + after.lstrip() if after.strip() else b""
    for line in range(first + 1, last + 1):
        lines[line] = b""


def _library() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    found = _walk(root, ".py")
    if not found:
        raise DataError(
            f"data.sources: installed: no standard library at {root}; domains python and english read it; use a Python "
            "that has its library as files, or set domains: [cpp]"
        )
    return found


def _topics_file() -> Path:
    spec = None
    with suppress(ModuleNotFoundError):  # of the package itself
        spec = importlib.util.find_spec("pydoc_data.topics")
    if spec is None or spec.origin is None:
        raise DataError(
            "data.sources: installed: this Python has no pydoc_data.topics; domain english reads it; install the full "
            "standard library, or set domains without english"
        )
    return Path(spec.origin)


def _headers() -> list[tuple[str, Path]]:
    spec = importlib.util.find_spec("torch")  # importing torch itself takes over a second
    found: list[tuple[str, Path]] = []
    if spec is not None and spec.origin is not None:
        root = Path(spec.origin).parent / "include"
        for top in ("c10", "torch"):
            found += [(f"{top}/{name}", path) for name, path in _walk(root / top, ".h")]
    if not found:
        raise DataError(
            "data.sources: installed: torch's C++ headers are not installed; domain cpp reads torch/include; install "
            "torch from a wheel, or set domains without cpp"
        )
    return found


def _walk(root: Path, suffix: str) -> list[tuple[str, Path]]:
    """Return (POSIX path relative to root, path) of all files with this suffix, sorted."""
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _is_excluded(name)]
        found += [Path(folder, name) for name in names if name.endswith(suffix) and not _is_excluded(name)]
    return sorted((path.relative_to(root).as_posix(), path) for path in found)


def _is_excluded(name: str) -> bool:
    return name in _GENERATED | _UNSTABLE or "generated" in name or name.startswith(_EXCLUDED_PREFIXES)
