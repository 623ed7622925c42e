"""Text that every machine with Turnout has: three domains of real text, without a download.

The documents are a function of the Python patch version and the torch version. A file is one document in each domain
it has text for; no text is in two domains.
"""

import ast
import hashlib
import importlib.util
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from trainer.data.records.base import SourcePart
from trainer.data.sources.base import Document, Source
from trainer.data.sources.files import readable
from trainer.data.sources.registry import InstalledSourceConfig
from trainer.errors import DataError

MIN_DOCSTRING_CHARACTERS = 60
"""Docstrings up to this length are labels rather than prose; they are in no domain."""

# Tests, tables and generated code are not what people write; the other folders are missing from some Linux
# distributions or from newer Pythons, and the corpus should not depend on that.
_UNWRITTEN = {"test", "tests", "idle_test", "encodings", "pydoc_data", "__phello__", "__pycache__"}
_UNSTABLE = {"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo", "site-packages", "dist-packages"}
_EXCLUDED_PREFIXES = (".", "_sysconfigdata", "config-", "sitecustomize")  # hidden, or written for one machine

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class SeparatedModule(NamedTuple):
    """One Python module, taken apart."""

    code: str
    """The module without its docstrings; still a valid module."""
    docstrings: list[str]
    """Its docstrings in order of appearance, indentation removed."""


class InstalledSource(Source):
    """Python's standard library (`python`), its documentation (`english`) and torch's C++ headers (`cpp`)."""

    def __init__(self, config: InstalledSourceConfig) -> None:
        self.weight = config.weight
        self._domains = frozenset(config.domains)

    def files(self) -> list[Path]:
        """Return the files of the chosen domains, sorted by their path in the library.

        Raises:
            DataError: if a domain is not installed.
        """
        found: list[Path] = []
        if self._domains & {"python", "english"}:
            found += [path for _, path in _library()]
        if "english" in self._domains:
            found.append(_topics_file())
        if "cpp" in self._domains:
            found += [path for _, path in _headers()]
        return found

    def parts(self) -> list[SourcePart]:
        """Return one part: a text that occurs twice is only noticed by who reads all.

        Raises:
            DataError: if a domain is not installed.
        """
        return [SourcePart(size_bytes=sum(path.stat().st_size for path in self.files()))]

    def read(self, part: SourcePart) -> Iterator[Document]:
        """Yield the documents: modules' code and docstrings, the topics of Python's manual, headers.

        A text that occurs twice in a domain (licences, stubs) is yielded once.

        Raises:
            DataError: if a domain is not installed or a file cannot be read.
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
                    # No header is known that is not UTF-8; if one comes, it must not stop the default config.
                    yield Document(name=name, domain="cpp", text=path.read_bytes().decode("utf-8", errors="replace"))

    def _module_documents(self, name: str, path: Path) -> Iterator[Document]:
        try:
            with readable(path), tokenize.open(path) as file:
                module = separate(file.read())
        except (SyntaxError, ValueError):
            return  # a template, or another version's syntax: not a module of this Python
        if "python" in self._domains:
            yield Document(name=name, domain="python", text=module.code)
        prose = [text for text in module.docstrings if len(text) > MIN_DOCSTRING_CHARACTERS]
        if "english" in self._domains and prose:
            yield Document(name=name, domain="english", text="\n\n".join(prose) + "\n")


def separate(source: str) -> SeparatedModule:
    """Take a module's docstrings out of its code.

    Raises:
        SyntaxError: if it is not a Python module.
    """
    lines = source.encode().splitlines(keepends=True)  # columns of the syntax tree count UTF-8 bytes
    found: list[tuple[int, str]] = []
    for node in _statements(ast.parse(source)):
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)) is not None:
            _cut(lines, node.body[0], alone=len(node.body) == 1 and not isinstance(node, ast.Module))
            found.append((node.body[0].lineno, text))
    return SeparatedModule(b"".join(lines).decode(), [text for _, text in sorted(found)])


def _statements(module: ast.Module) -> list[ast.AST]:
    """List the module and all statements in it; ast.walk goes into expressions too, which doubles the time."""
    nodes: list[ast.AST] = [module]
    for node in nodes:  # grows meanwhile
        for part in ("body", "orelse", "finalbody", "handlers", "cases"):
            nodes += getattr(node, part, ())
    return nodes


def _cut(lines: list[bytes], docstring: ast.stmt, *, alone: bool) -> None:
    """Take a docstring out of the lines, in place; line numbers stay right, so that more can be cut."""
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
    try:
        spec = importlib.util.find_spec("pydoc_data.topics")
    except ModuleNotFoundError:  # the package itself is missing
        spec = None
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
    """Return (path below root with forward slashes, path), sorted by the former."""
    found: list[tuple[str, Path]] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _is_excluded(name)]
        for name in names:
            if name.endswith(suffix) and not _is_excluded(name):
                path = Path(folder, name)
                found.append((path.relative_to(root).as_posix(), path))
    return sorted(found)


def _is_excluded(name: str) -> bool:
    return name in _UNWRITTEN | _UNSTABLE or "generated" in name or name.startswith(_EXCLUDED_PREFIXES)
