"""The blocks of docs/library.md run as they are printed, one after the other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launched_ranks import ROOT
from tests.unit.test_docs import blocks_of

pytestmark = pytest.mark.slow


def test_the_blocks_of_the_library_page_run(tmp_path: Path) -> None:
    blocks = [block.text for block in blocks_of(ROOT / "docs/library.md") if block.language == "python"]
    assert len(blocks) == 3
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "runs/library/checkpoints/step_00000010").is_dir()
    assert "[5, 10]" in result.stdout
