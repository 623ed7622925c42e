import re
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.data.config import DataConfig, SplitConfig
from trainer.data.corpus import Corpus, build_corpus
from trainer.data.sources.base import Document
from trainer.data.sources.registry import InstalledSourceConfig, SourceConfig, TextSourceConfig
from trainer.errors import DataError


@pytest.fixture
def fails() -> Callable[[str], pytest.RaisesExc[DataError]]:
    """Expect a DataError with exactly this text."""
    return lambda text: pytest.raises(DataError, match=f"^{re.escape(text)}$")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def make_corpus(folder: Path) -> Callable[..., Corpus]:
    """Build a corpus of one text per domain, its last half or `fraction` held out."""

    def make(fraction: float = 0.5, **texts: str) -> Corpus:
        for domain, text in texts.items():
            (folder / f"{domain}.txt").write_text(text)
        sources: list[SourceConfig] = [TextSourceConfig(path=f"{domain}.txt", domain=domain) for domain in texts]
        return build_corpus(DataConfig(sources=sources, split=SplitConfig(fraction=fraction), cache_dir="cache"))

    return make


@pytest.fixture(scope="session")
def installed_documents() -> list[Document]:
    """Every document of the installed corpus; parsing the standard library takes seconds, so it is done once."""
    return list(InstalledSourceConfig().build().documents())
