"""Follow a run from another process: new records of its files, and its end."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any


class EndOfRun:
    """Waits on a thread for the end of the run, and ends this process at the latest some time after that."""

    def __init__(self, *, outlive_s: float) -> None:
        self.has_come = threading.Event()
        self.exit_code = 1
        """Exit code of the run, read from standard input; 1 if the run was killed."""
        threading.Thread(target=self._wait, args=(outlive_s,), daemon=True).start()

    def _wait(self, outlive_s: float) -> None:
        line = sys.stdin.readline().strip()
        self.exit_code = int(line) if line else 1
        self.has_come.set()
        time.sleep(outlive_s)
        os._exit(1)


class Tail:
    """Records of a growing JSONL file."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Yield the complete records not yielded before; none while the file does not exist."""
        with suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._offset)
            while (line := file.readline()).endswith(b"\n"):
                self._offset = file.tell()
                yield json.loads(line)
