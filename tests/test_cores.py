"""How many cores are used: those of the affinity mask, within the CPU quotas of containers."""

import os

import pytest

from relabel import cores


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(cores in the affinity mask, /proc/self/cgroup, {file below /sys/fs/cgroup: text})."""

    def make(count, own, files):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(count)))
        monkeypatch.setattr(cores, "OWN_GROUPS", tmp_path / "own")
        monkeypatch.setattr(cores, "GROUPS", tmp_path / "groups")
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            file = tmp_path / "groups" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")

    return make


OLD = "5:memory:/a\n4:cpu,cpuacct:/docker/12ab\n3:cpuset:/\n0::/\n"


@pytest.mark.parametrize(
    "own, files, expected",
    [
        ("0::/\n", {}, 16),  # no quota: a root group has no file
        ("0::/\n", {"cpu.max": "max 100000"}, 16),
        ("0::/\n", {"cpu.max": "400000 100000"}, 4),  # in a container, whose own group is its root
        ("0::/\n", {"cpu.max": "250000 100000"}, 3),
        ("0::/\n", {"cpu.max": "10000 100000"}, 1),
        ("0::/\n", {"cpu.max": "3200000 100000"}, 16),  # more than there are
        (
            "0::/slurm/job_7/step_0\n",
            {"slurm/job_7/cpu.max": "800000 100000", "slurm/job_7/step_0/cpu.max": "max 1"},
            8,
        ),
        ("0::/slurm/job_7\n", {"slurm/cpu.max": "200000 100000", "slurm/job_7/cpu.max": "800000 100000"}, 2),
        ("0::/../../other\n", {"cpu.max": "500000 100000"}, 5),  # named from outside of the container
        (OLD, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
        (OLD, {"cpu/cpu.cfs_quota_us": "600000", "cpu/cpu.cfs_period_us": "100000"}, 6),
        (OLD, {"cpu/docker/12ab/cpu.cfs_quota_us": "50000", "cpu/docker/12ab/cpu.cfs_period_us": "20000"}, 3),
        ("12:name=systemd:/user.slice/a:b\n", {"cpu.max": "100000 100000"}, 16),  # no group of these is one of CPUs
    ],
)
def test_quotas_of_both_versions_and_of_every_level_count(machine, own, files, expected):
    machine(16, own, files)
    assert cores.usable_cores() == expected


def test_the_affinity_mask_counts_where_it_is_less(machine):
    machine(2, "0::/\n", {"cpu.max": "400000 100000"})
    assert cores.usable_cores() == 2


def test_a_machine_without_cgroups_has_no_quota(machine, monkeypatch, tmp_path):
    machine(3, "", {})
    monkeypatch.setattr(cores, "OWN_GROUPS", tmp_path / "nowhere")
    assert cores.usable_cores() == 3
