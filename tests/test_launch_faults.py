# SPDX-License-Identifier: Apache-2.0
"""The life of a run on a cloud that fails: each failure ends with one line and its own status, what
can go on goes on, and nothing that was done is lost."""

import os
import signal
import subprocess

import pytest

from tests.fake_cloud import Cloud, until

TRAIN = "train --config=configs/demo.py --workdir=gs://bucket/demo"
SUPERVISE = f"launch/supervise.sh {TRAIN}"


@pytest.fixture(params=["queued", "compute"])
def cloud(tmp_path, request):
    cloud = Cloud(tmp_path / "cloud", api=request.param)
    yield cloud
    cloud.close()


@pytest.fixture
def queued(tmp_path):
    cloud = Cloud(tmp_path / "cloud")
    yield cloud
    cloud.close()


def requests(cloud: Cloud) -> int:
    return cloud.count("create", "queued-resources") + cloud.count("resize")


def deletes(cloud: Cloud) -> int:
    return cloud.count("delete", "queued-resources") + cloud.count("delete", "instance-groups")


def starts(cloud: Cloud) -> int:
    """How often the run was started, on both workers each time."""
    lines = cloud.lines("runs")
    assert all(line.endswith(TRAIN) for line in lines) and len(lines) % 2 == 0
    return len(lines) // 2


def last(done: subprocess.CompletedProcess) -> str:
    return done.stderr.splitlines()[-1]


def test_a_tpu_that_is_taken_away_is_asked_for_again_and_the_same_command_continues(cloud):
    cloud.script("", "take", "", "end 0")
    done = cloud.shell(SUPERVISE)
    assert done.returncode == 0, done.stderr
    assert (requests(cloud), starts(cloud), deletes(cloud)) == (2, 2, 2)
    assert "finished after 1 restarts" in done.stdout
    log = (cloud.checkout / "runs/vlm-jax.log").read_text()
    assert log.count(": step 1") == 2  # of each worker of the second TPU


def test_a_run_whose_disks_are_gone_counts_as_a_restart(cloud):
    """What a TPU looks like that is taken away while its workers are asked."""
    cloud.script("", "wipe", "", "", "end 0")
    done = cloud.shell(SUPERVISE)
    assert done.returncode == 0, done.stderr
    assert (requests(cloud), starts(cloud)) == (1, 2)
    assert "the run was lost; start 2 of" in done.stdout
    assert "finished after 1 restarts" in done.stdout


def test_a_group_that_lost_a_machine_is_replaced_whole(tmp_path):
    cloud = Cloud(tmp_path / "cloud", api="compute")
    cloud.script("", "vanish vlm-jax-c3d4", "", "end 0")
    done = cloud.shell(SUPERVISE)
    assert done.returncode == 0, done.stderr
    assert (requests(cloud), starts(cloud), deletes(cloud)) == (2, 2, 2)


def test_a_quota_that_is_too_small_ends_at_once(queued):
    for script in ("launch/create.sh", SUPERVISE):
        queued.fault("quota")
        done = queued.shell(script)
        assert done.returncode == 3
        assert last(done).startswith("create.sh: the quota does not allow it")
    assert queued.count("ssh") == 0 and queued.count("delete") == 0


def test_no_permission_ends_at_once(queued):
    queued.fault("permission", 3)
    for script in ("launch/create.sh", "launch/delete.sh", SUPERVISE):
        done = queued.shell(script)
        assert done.returncode == 3 and "permission refused" in last(done)
    assert all("list" in call for call in queued.calls()) and len(queued.calls()) == 3


def test_a_tpu_taken_away_before_it_was_ready_is_asked_for_again(queued):
    (queued.folder / "planned").write_text("WAITING_FOR_RESOURCES SUSPENDED\nPROVISIONING ACTIVE")
    done = queued.shell("launch/create.sh")
    assert done.returncode == 69 and "taken away before it was ready" in last(done)
    queued.script("", "end 0")
    done = queued.shell(SUPERVISE)
    assert done.returncode == 0, done.stderr
    assert (requests(queued), starts(queued)) == (2, 1)


def test_a_request_that_always_fails_is_given_up_with_its_reason(queued):
    (queued.folder / "planned").write_text("WAITING_FOR_RESOURCES FAILED\n" * 9)
    (queued.folder / "reason").write_text("no such runtime version")
    done = queued.shell(SUPERVISE)
    assert done.returncode == 70 and "3 times in a row" in last(done)
    assert done.stderr.count("the request for vlm-jax failed: no such runtime version") == 3


def test_lost_connections_lose_nothing(queued):
    """One to the cloud before the TPU is there and one while it runs; ssh refused for a while."""
    queued.fault("network")
    queued.fault("refuse-1", 2)
    queued.script("fail network 1", "", "fail refuse-1 2", "", "", "end 0")
    done = queued.shell(SUPERVISE)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("asking again") == 2
    assert done.stderr.count("worker 1 gave no answer") == 3
    assert "setup.sh: a worker could not be reached" in done.stderr
    assert (requests(queued), starts(queued), deletes(queued)) == (1, 1, 1)


def test_a_cloud_that_stays_silent_leaves_the_run_alone(queued):
    queued.script("", "fail network 99")
    done = queued.shell(SUPERVISE)
    assert done.returncode == 75 and "what runs goes on" in last(done)
    assert (starts(queued), deletes(queued)) == (1, 0)
    # The same command finds it.
    queued.fault("network", 0)
    queued.script("", "end 0")
    done = queued.shell(SUPERVISE)
    assert done.returncode == 0 and starts(queued) == 1


def test_a_worker_that_refuses_ssh_is_named(cloud):
    cloud.shell("launch/create.sh")
    worker = "1" if (cloud.folder / "home/1").exists() else "vlm-jax-c3d4"
    assert cloud.shell("launch/setup.sh").returncode == 0
    cloud.fault(f"refuse-{worker[-4:]}")
    done = cloud.shell(f"launch/run.sh {TRAIN}")
    assert done.returncode == 75 and f"worker {worker} gave no answer" in done.stderr
    # The other one runs; the same command starts what does not.
    assert cloud.shell(f"launch/wait.sh {TRAIN}").returncode == 66
    assert cloud.shell(f"launch/run.sh {TRAIN}").stdout.count("already running") == 1
    until(lambda: len(cloud.lines("runs")) == 2)
    assert starts(cloud) == 1


def test_a_worker_that_is_never_reached_again_has_the_tpu_exchanged(queued):
    queued.script("", "fail refuse-1 4", *[""] * 5, "end 0")
    done = queued.shell(SUPERVISE, PATIENCE="2")
    assert done.returncode == 0, done.stderr
    assert "a worker of vlm-jax could not be reached; start 2" in done.stdout
    assert (requests(queued), starts(queued), deletes(queued)) == (2, 2, 2)


def test_a_run_that_was_stopped_or_lost_a_worker_is_continued_on_the_same_tpu(queued):
    """SIGTERM, one process killed, one machine rebooted; without its peer the other process ends
    too, here because it is told to."""
    queued.script("", "term", *[""] * 3, "kill 1", "term", *[""] * 3, "reboot 1", "term",
                  *[""] * 3, "end 0")  # fmt: skip
    done = queued.shell(SUPERVISE)
    assert done.returncode == 0, done.stderr
    assert (requests(queued), starts(queued), deletes(queued)) == (1, 4, 1)
    assert "the run was stopped; start 4 of at most 51" in done.stdout


def test_a_process_that_hangs_without_its_peer_is_stopped(queued):
    queued.script("kill 1", *[""] * 5, "end 0")
    done = queued.shell(f"launch/create.sh && launch/setup.sh && launch/run.sh {TRAIN}")
    until(lambda: len(queued.lines("runs")) == 2)
    done = queued.shell(SUPERVISE, PATIENCE="2")
    assert done.returncode == 0, done.stderr
    assert starts(queued) == 2
    assert "worker.sh stop TERM" in done.stdout


def test_a_run_that_always_stops_is_given_up_and_the_tpu_kept_if_so_wanted(queued):
    queued.script("", "end 42")
    done = queued.shell(SUPERVISE, MAX_RESTARTS="1", KEEP="1")
    assert done.returncode == 1 and "gave up after 1 restarts; the log: runs/" in last(done)
    assert (starts(queued), deletes(queued)) == (2, 0)


def test_an_error_of_the_program_is_not_repeated(queued):
    queued.script("", "end 1")
    done = queued.shell(SUPERVISE)
    assert done.returncode == 1
    assert "the run failed: worker 0 with status 1, worker 1 with status 1" in done.stderr
    assert last(done) == "supervise.sh: the run failed; the log: runs/vlm-jax.log"
    assert (starts(queued), deletes(queued)) == (1, 1)


def test_another_run_on_the_tpu_is_left_alone(queued):
    assert queued.shell("launch/create.sh && launch/setup.sh").returncode == 0
    assert queued.shell("launch/run.sh train --workdir=gs://bucket/other").returncode == 0
    done = queued.shell(SUPERVISE)
    assert done.returncode == 73 and "something else runs on vlm-jax" in last(done)
    assert deletes(queued) == 0 and len(queued.lines("runs")) == 2


def test_a_supervisor_that_dies_leaves_the_run_and_finds_it_again(queued):
    process = subprocess.Popen(
        ["bash", "-c", SUPERVISE],
        cwd=queued.checkout,
        env=queued.environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    until(lambda: len(queued.lines("runs")) == 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    queued.script("", "end 0")
    done = queued.shell(SUPERVISE)
    assert done.returncode == 0, done.stderr
    assert (requests(queued), starts(queued), deletes(queued)) == (1, 1, 1)
