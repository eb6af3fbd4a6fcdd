"""What is left behind: processes, ports and files after an end of any kind; ranks of launchers; several machines."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install ascend-kit[cluster]")

from ascend_kit import AscendInferEngine, SamplingParams
from ascend_kit.engine import ray_watch
from ascend_kit.engine.core import ReplicasLost

pytestmark = pytest.mark.multiproc

HERE = Path(__file__).parent
LIMIT_S = 200
SETTINGS = dict(precision="fp32", device="cpu", max_seq_length=512, batch_size=2, block_size=16, kv_cache_gib=0.02)


def environment(**changes):
    return {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1", **changes}


def stat_of(pid):
    """(parent, start time) of a process, or None when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else (int(fields[1]), fields[19])


def descendants(root):
    """{pid: start time} of all processes below `root`."""
    known = {int(p.name): stat_of(p.name) for p in Path("/proc").glob("[0-9]*")}
    found, front = {}, {root}
    while front:
        front = {pid for pid, stat in known.items() if stat and stat[0] in front and pid not in found}
        found.update({pid: known[pid][1] for pid in front})
    return found


def listening_addresses(pids):
    """Local addresses of the listening TCP sockets of some processes."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                inodes.add(os.readlink(link))
            except OSError:
                continue
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                raw = bytes.fromhex(fields[1].split(":")[0])
                words = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
                found.add(socket.inet_ntop(family, words))
    return found


def shared_memory_without_owner():
    """Names in /dev/shm that no living process has open or mapped: other tests that run meanwhile have their own.

    Without those of OpenMP: it registers every process that loads it there, and one that is killed leaves its name.
    """
    names, used = set(os.listdir("/dev/shm")), set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            used.update(re.findall(r"/dev/shm/(\S+)", (process / "maps").read_text()))
        with contextlib.suppress(OSError):
            for link in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    used.add(os.readlink(link).removeprefix("/dev/shm/"))
    return {name for name in names - used if not name.startswith("__KMP_")}


def wait_for(condition, what, limit_s=LIMIT_S):
    end = time.monotonic() + limit_s
    while not (result := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.1)
    return result


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGKILL], ids=["interrupted", "killed"]
)
def test_nothing_is_left_after_the_driver_was(number, tiny_qwen3_dir, tmp_path):
    shared = shared_memory_without_owner()
    driver = subprocess.Popen(
        [sys.executable, HERE / "cluster_script.py", str(tiny_qwen3_dir)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(TMPDIR=str(tmp_path)),
        start_new_session=True,
    )
    try:
        line = driver.stdout.readline()
        assert line == "running\n", driver.stderr.read()
        time.sleep(1.0)
        family = descendants(driver.pid)
        addresses = listening_addresses([driver.pid, *family])

        if number == signal.SIGINT:
            os.killpg(driver.pid, number)  # as Jupyter does: the whole process group gets it
        else:
            os.kill(driver.pid, number)  # kill -9 of the driver alone
        _, errors = driver.communicate(timeout=LIMIT_S)
    finally:
        driver.kill()

    assert len(family) >= 4 and addresses and addresses <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    wait_for(
        lambda: all((stat_of(pid) or (0, None))[1] != start for pid, start in family.items()),
        f"still there: {[pid for pid in family if stat_of(pid)]}",
        30,
    )
    wait_for(lambda: shared_memory_without_owner() <= shared, "shared memory is left", 30)
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in errors
    folders = [tmp_path, Path("/tmp")]  # Ray's own is in the shorter of the two: socket names have a longest length
    wait_for(
        lambda: not [name for root in folders for name in root.glob(f"ascend-ray-{driver.pid}-*")],
        "Ray's folder is still there",
        30,
    )
    assert not list(tmp_path.glob("ascend-*"))


def ray_process(driver, name):
    """The process of a driver's own Ray with this name."""
    for pid in descendants(driver):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_text()
            if name in words and "ray_watch" not in words:
                return pid
    raise AssertionError(f"no {name} below {driver}")


@pytest.mark.long
@pytest.mark.parametrize("name", ["gcs_server", "ray::DashboardAgent"])
def test_a_lost_part_of_ray_restarts_it_once_and_every_request_is_answered_once(name, tiny_qwen3_dir):
    prompts, sampling = [[1, 2, 3 + n] for n in range(20)], SamplingParams(max_new_tokens=100, ignore_eos=True)
    with AscendInferEngine(tiny_qwen3_dir, cards=2, **SETTINGS) as engine:
        family = descendants(os.getpid())
        victims = [ray_process(os.getpid(), name)]

        def kill(done, total):
            if victims and done >= 2:
                os.kill(victims.pop(), signal.SIGKILL)

        outputs = engine.generate(prompts, sampling, on_progress=kill)
        wait_for(lambda: [pid for pid in family if stat_of(pid)] == [], "the first Ray is still there", 30)
        family = descendants(os.getpid())
        victims = [ray_process(os.getpid(), name)]
        with pytest.raises(ReplicasLost, match="ended again") as caught:
            engine.generate(prompts, sampling, on_progress=kill)

    wait_for(lambda: [pid for pid in family if stat_of(pid)] == [], "the second Ray is still there", 30)
    assert 1 <= len(caught.value.outputs) < len(prompts)
    with AscendInferEngine(tiny_qwen3_dir, **SETTINGS) as engine:
        expected = engine.generate(prompts, sampling)
    assert [(o.index, o.token_ids) for o in outputs] == [(o.index, o.token_ids) for o in expected]


def test_the_watchdog_ends_agents_whose_ray_was_killed_under_a_living_driver(tmp_path):
    """The agent's command line does not name the session, and its parent is gone: Ray's agents look like that."""
    folder = tmp_path / f"ascend-ray-{uuid.uuid4().hex}"
    folder.mkdir()
    script = "import subprocess, time; print(subprocess.Popen(['sleep', '100']).pid, flush=True); time.sleep(100)"
    core = subprocess.Popen([sys.executable, "-c", script, f"--log_dir={folder}"], stdout=subprocess.PIPE, text=True)
    agent = int(core.stdout.readline())
    command = [sys.executable, "-I", ray_watch.__file__, str(folder), str(os.getpid())]
    watch = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
    watch.stdin.write(json.dumps({core.pid: stat_of(core.pid)[1]}) + "\n")
    watch.stdin.flush()
    time.sleep(1.2)  # two of its looks
    assert watch.poll() is None and stat_of(agent)

    core.kill()

    assert watch.wait(10) == 0
    assert not folder.exists() and stat_of(agent) is None


def test_folders_of_killed_drivers_are_removed_by_the_next(tmp_path, monkeypatch):
    from ascend_kit.engine import ray_cluster

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders = {
        pid: [tmp_path / f"ascend-ray-{pid}-a", tmp_path / f"ascend-meeting-{pid}-b"] for pid in (os.getpid(), gone.pid)
    }
    for folder in folders[os.getpid()] + folders[gone.pid]:
        (folder / "session").mkdir(parents=True)

    ray_cluster._remove_leftovers()

    assert all(folder.is_dir() for folder in folders[os.getpid()])
    assert not any(folder.exists() for folder in folders[gone.pid])


def test_processes_of_a_start_that_failed_half_way_are_ended(tmp_path):
    folder = tmp_path / f"ascend-ray-{uuid.uuid4().hex}"
    theirs = subprocess.Popen(["sleep", "100"])
    ours = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)", f"--log_dir={folder}/logs"])
    wait_for(lambda: str(folder) in Path(f"/proc/{ours.pid}/cmdline").read_text(), "the process did not start")

    ray_watch.end_processes(folder)

    assert ours.wait(timeout=10) == -signal.SIGKILL and theirs.poll() is None
    theirs.kill()
    theirs.wait()


@pytest.mark.parametrize("launcher,size,tensor_parallel", [("torchrun", 2, 1), ("mpirun", 2, 2)])
def test_ranks_of_a_launcher_answer_together(launcher, size, tensor_parallel, tiny_qwen3_dir, tmp_path):
    draw = random.Random(5)
    prompts = [[draw.randrange(255) for _ in range(draw.choice([2, 17, 60]))] for _ in range(7)]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    script = [HERE / "rank_script.py", tiny_qwen3_dir, tmp_path / "prompts.json", tmp_path, tensor_parallel]

    if launcher == "torchrun":
        commands = [(["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", *script], {})]
    else:  # mpirun itself is not needed: what it gives its processes are variables
        job = uuid.uuid4().hex
        commands = [
            (
                script,
                {
                    "OMPI_COMM_WORLD_RANK": str(rank),
                    "OMPI_COMM_WORLD_SIZE": str(size),
                    "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
                    "PMIX_NAMESPACE": job,
                },
            )
            for rank in range(size)
        ]
    running = [
        subprocess.Popen(
            [sys.executable, *map(str, command)], env=environment(**extra), stderr=subprocess.PIPE, text=True
        )
        for command, extra in commands
    ]
    errors = [process.communicate(timeout=LIMIT_S)[1] for process in running]

    assert [process.returncode for process in running] == [0] * len(running), errors
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(size)]
    with AscendInferEngine(tiny_qwen3_dir, **{**SETTINGS, "max_seq_length": 256}) as engine:
        expected = [output.token_ids for output in engine.generate(prompts, SamplingParams(max_new_tokens=8))]
    for result in results:
        assert result["tokens"] == expected and result["index"] == list(range(7))
        assert result["scores"] == results[0]["scores"]
    leaders = results[::tensor_parallel]
    shares = [4 * 8, 3 * 8] if len(leaders) == 2 else [7 * 8]  # every second one, or all
    assert [result["own_tokens"] for result in leaders] == shares


@pytest.mark.long
def test_a_machine_lost_in_the_middle_does_not_lose_a_request(tiny_qwen3_dir, monkeypatch):
    """Two Ray nodes with a card each, and a head without any; one node dies while both replicas work."""
    import ray
    from ray.cluster_utils import Cluster

    from ascend_kit.engine import replica
    from ascend_kit.engine.ray_cluster import OBJECT_STORE_BYTES, QUIET

    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(replica, "START_S", 60.0)
    common = dict(object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False)
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **common})
    try:
        nodes = [machines.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES) for _ in range(2)]
        draw = random.Random(8)
        prompts = [[draw.randrange(255) for _ in range(12)] for _ in range(12)]
        sampling = SamplingParams(max_new_tokens=120, ignore_eos=True)
        with AscendInferEngine(tiny_qwen3_dir, cards=2, ray_address=machines.address, **SETTINGS) as engine:
            lost = []

            def lose_a_machine(done, total):
                if not lost:
                    lost.append(machines.remove_node(nodes[0], allow_graceful=False))

            outputs = engine.generate(prompts, sampling, on_progress=lose_a_machine)
            states = [row["state"] for row in engine.stats()["replicas"]]
        assert not ray.is_initialized(), "the engine leaves the cluster it joined"
    finally:
        machines.shutdown()

    with AscendInferEngine(tiny_qwen3_dir, **SETTINGS) as engine:
        expected = engine.generate(prompts, sampling)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
    assert states.count("ready") == 1
