"""Facts of this machine, and of mount tables."""

from pathlib import Path

import pytest

from trainer.doctor.host_facts import HostFacts, read_host

MOUNTS = """22 1 8:1 / / rw - ext4 /dev/sda1 rw
30 22 0:40 / {folder} rw,nosuid shared:3 - tmpfs tmpfs rw
31 22 0:41 / {folder}/a\\040b rw - fuse.s3fs s3fs rw
damaged
"""


def test_the_file_system_is_that_of_the_innermost_mount(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(MOUNTS.format(folder=tmp_path))
    kinds = {
        folder: read_host(folder, {}, mounts=table).file_system
        for folder in (Path("/usr"), tmp_path / "runs" / "new", tmp_path / "a b" / "runs")
    }
    (tmp_path / "a b").mkdir()
    assert list(kinds.values())[:2] == ["ext4", "tmpfs"]
    assert read_host(tmp_path / "a b" / "runs", {}, mounts=table).file_system == "fuse.s3fs"
    assert read_host(tmp_path, {}, mounts=tmp_path / "none").file_system is None


def test_ranks_are_those_of_the_launcher_unless_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    host = read_host(tmp_path, {})
    assert (host.world_size, host.ranks_here, host.num_nodes) == (8, 4, 2)
    host = read_host(tmp_path, {}, world_size=64, ranks_here=8)
    assert (host.world_size, host.ranks_here, host.num_nodes) == (64, 8, 8)


def test_facts_of_this_machine_are_read(tmp_path: Path) -> None:
    host = read_host(tmp_path / "not" / "there", {"A": "3", "B": "three"})
    assert host.cores >= 1 and host.free_bytes and host.open_files != 0
    assert (host.number("A"), host.number("B"), host.number("C")) == (3, None, None)
    assert HostFacts(world_size=9, ranks_here=8).num_nodes == 2
