"""The wheel: it holds the package with its configs and schema, and trains from an empty folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
"""Without PYTHONPATH, which leads to the checkout."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that is built from a copy, so that the checkout gets no build/."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("configs", "trainer", "tests/end_to_end"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    pip(out, "wheel", "--no-deps", "--no-build-isolation", "-w", out, source)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel; all other packages come from the one that runs the tests."""
    prefix = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", prefix], check=True)
    python = prefix / "bin/python"
    pip(prefix, "--python", python, "install", "--no-deps", wheel)
    (site,) = prefix.glob("lib/python*/site-packages")
    (site / "shared.pth").write_text(sysconfig.get_path("purelib"))  # its own .pth files, and so a clone, are not read
    return prefix


def pip(folder: Path, *arguments: str | Path) -> None:
    command = [sys.executable, "-P", "-m", "pip", "-q", "--disable-pip-version-check", *arguments]
    subprocess.run(command, cwd=folder, env=ENVIRONMENT, check=True)


def turnout(installed: Path, folder: Path, *arguments: str) -> str:
    command = [installed / "bin/turnout", *arguments]
    result = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_wheel_holds_the_package_its_configs_and_schema_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"trainer/configs/{path.name}" for path in (ROOT / "configs").iterdir() if path.is_file()}
    assert {"trainer/configs/quickstart.yaml", "trainer/configs/schema.json"} < configs
    assert {name for name in names if name.startswith("trainer/configs/")} == configs
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "trainer").rglob("*.py")}
    assert names - configs == {
        *modules,
        "trainer/config/foreign_names.toml",
        *(f"trainer/data/chat/templates/{name}.jinja" for name in ("byte", "chatml")),
        "trainer/py.typed",
        *(name for name in names if name.startswith("turnout-") and ".dist-info/" in name),
    }


@pytest.mark.nightly
def test_an_installed_wheel_trains_a_shipped_config_and_writes_a_first_one_in_an_empty_folder(
    installed: Path, tmp_path: Path
) -> None:
    where = subprocess.run(
        [installed / "bin/python", "-P", "-c", "import trainer; print(trainer.__file__)"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    ).stdout
    assert where.startswith(str(installed))
    turnout(installed, tmp_path, "train", "smoke", "train.steps=2")
    assert (tmp_path / "runs/smoke/checkpoints/step_00000002").is_dir()
    turnout(installed, tmp_path, "init", "mine")
    turnout(installed, tmp_path, "config", "show", "mine.yaml")
