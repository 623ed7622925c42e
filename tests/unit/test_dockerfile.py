"""The Dockerfile, not built here: it copies files that exist, installs only the lock and does not run as root."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
STEPS = [line.split(maxsplit=1) for line in LINES if line and not line.startswith(("#", " "))]


def values(instruction: str) -> list[str]:
    return [text for name, text in STEPS if name == instruction]


def test_what_it_copies_is_there_and_in_the_build_context_and_nothing_else_is() -> None:
    copied = {name for text in values("COPY") for name in text.split()[:-1]}
    assert all((ROOT / name).exists() for name in copied)
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignore[1] == "*"
    assert {line.removeprefix("!") for line in ignore if line.startswith("!")} == copied


def test_it_has_what_set_up_reads() -> None:
    set_up = (ROOT / "scripts/setup.sh").read_text() + (ROOT / "scripts/install.py").read_text()
    copied = {name for text in values("COPY") for name in text.split()[:-1]}
    assert {"pyproject.toml", "requirements", "scripts", "trainer", "configs"} <= copied
    assert "requirements/" in set_up and "pyproject.toml" in set_up
    assert sum("scripts/setup.sh launch" in text for text in values("RUN")) == 1


def test_its_base_has_a_tag_and_its_user_is_not_root() -> None:
    base = next(text for text in values("ARG") if text.startswith("BASE="))
    assert re.fullmatch(r"BASE=python:3\.1[123]-slim-\w+", base)
    (user,) = values("USER")
    assert user not in ("root", "0")
    assert [name for name, _ in STEPS].index("USER") > max(i for i, (name, _) in enumerate(STEPS) if name == "RUN")


def test_it_fetches_nothing_past_pip_and_apt() -> None:
    assert not re.search(r"curl|wget|pip install|://", "\n".join(values("RUN")))
