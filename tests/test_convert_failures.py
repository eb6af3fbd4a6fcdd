"""What can go wrong while converting, caused for real: kills, full disks, damaged and contradicting files."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ascend_kit.checkpoint.convert import convert
from ascend_kit.checkpoint.manifest import verify
from ascend_kit.checkpoint.tensor_file import CheckpointError
from ascend_kit.checkpoint.writer import undo_exchange
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.tensors import expected_shapes

SHARD_BYTES = 120_000  # cuts the tiny model into several shards


def run_script(body: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    script = "import sys, os, time\nfrom pathlib import Path\n" + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def partial(destination: Path) -> Path:
    return destination.parent / f".{destination.name}.partial"


# ---- interruption
# -------------------------------------------------------------------------------------------

KILL_LOOP = """
    from ascend_kit.checkpoint.convert import convert
    from ascend_kit.checkpoint.manifest import verify
    import random, signal
    source, destination = Path(sys.argv[1]), Path(sys.argv[2])
    random.seed(0)
    outcomes = []
    for attempt in range(12):
        child = os.fork()
        if child == 0:
            convert(source, destination, max_shard_bytes=120_000, if_exists="overwrite",
                    precision=("fp16", "bf16")[attempt % 2], on_progress=lambda *_: time.sleep(0.004))
            os._exit(0)
        time.sleep(random.uniform(0.01, 0.4))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if destination.exists():
            assert verify(destination, full=True)
        outcomes.append(os.WIFSIGNALED(status))
    print(outcomes)
"""


def test_destination_is_absent_or_complete_whenever_the_process_is_killed(tiny_qwen3_dir: Path, tmp_path: Path):
    done = run_script(KILL_LOOP, tiny_qwen3_dir, tmp_path / "result")

    assert "True" in done.stdout  # at least one child was killed before it had finished
    result = convert(tiny_qwen3_dir, tmp_path / "last", max_shard_bytes=SHARD_BYTES)
    assert verify(result.folder, full=True)


KILL_IN_SECOND_SHARD = """
    from ascend_kit.checkpoint.convert import convert
    import signal
    def progress(done, total, _):
        if done > 180_000:
            os.kill(os.getpid(), signal.SIGKILL)
    convert(sys.argv[1], sys.argv[2], max_shard_bytes=120_000, on_progress=progress)
"""


@pytest.fixture
def killed(tiny_qwen3_dir: Path, tmp_path: Path) -> Path:
    """A destination whose conversion was killed inside the second shard."""
    done = run_script(KILL_IN_SECOND_SHARD, tiny_qwen3_dir, tmp_path / "result", check=False)
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "result").exists() and partial(tmp_path / "result").is_dir()
    return tmp_path / "result"


def test_rerun_after_a_kill_keeps_the_finished_shard_and_ends_equal(tiny_qwen3_dir: Path, tmp_path: Path, killed: Path):
    finished = next(partial(killed).glob("model-00001-of-*.safetensors"))
    stamp = finished.stat().st_mtime_ns

    result = convert(tiny_qwen3_dir, killed, max_shard_bytes=SHARD_BYTES)

    assert result.resumed_shards == (finished.name,)
    assert (killed / finished.name).stat().st_mtime_ns == stamp
    fresh = convert(tiny_qwen3_dir, tmp_path / "fresh", max_shard_bytes=SHARD_BYTES)
    for path in fresh.folder.glob("*.safetensors"):
        assert path.read_bytes() == (killed / path.name).read_bytes()
    assert verify(killed, full=True) and not partial(killed).exists()


def test_finished_shard_with_a_flipped_byte_is_written_again(tiny_qwen3_dir: Path, killed: Path):
    shard = next(partial(killed).glob("model-00001-of-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-10] ^= 1
    shard.write_bytes(data)

    result = convert(tiny_qwen3_dir, killed, max_shard_bytes=SHARD_BYTES)

    assert result.resumed_shards == () and verify(killed, full=True)


@pytest.mark.parametrize("change", ["settings", "source"])
def test_leftovers_of_another_conversion_are_not_mixed_in(
    tiny_qwen3_dir: Path, tmp_path: Path, killed: Path, change: str
):
    source = shutil.copytree(tiny_qwen3_dir, tmp_path / "source") if change == "source" else tiny_qwen3_dir

    result = convert(source, killed, max_shard_bytes=SHARD_BYTES, precision="fp16" if change == "settings" else "bf16")

    assert result.resumed_shards == () and verify(killed, full=True)


def test_kill_between_the_two_renames_of_an_overwrite_is_healed(tiny_qwen3_dir: Path, tmp_path: Path):
    destination = convert(tiny_qwen3_dir, tmp_path / "result").folder
    destination.rename(tmp_path / ".result.old")  # the state in which such a kill leaves the folder

    result = convert(tiny_qwen3_dir, destination, if_exists="overwrite")

    assert verify(result.folder, full=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result"]


@pytest.mark.parametrize("is_replaced", [True, False])
def test_what_a_stopped_exchange_left_is_cleared_up_and_named_by_the_next_conversion(
    tiny_qwen3_dir: Path, tmp_path: Path, is_replaced: bool, caplog
):
    destination = convert(tiny_qwen3_dir, tmp_path / "result").folder
    old = tmp_path / ".result.old"
    shutil.copytree(destination, old) if is_replaced else destination.rename(old)
    with open(tmp_path / ".result.lock", "w") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        assert undo_exchange(destination) is None and old.exists()  # a running conversion owns it

    assert convert(tiny_qwen3_dir, destination, if_exists="reuse").reused

    assert str(old) in caplog.text if is_replaced else ".result.old" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result"]


def test_second_conversion_to_the_same_place_is_refused_while_the_first_runs(tiny_qwen3_dir: Path, tmp_path: Path):
    complaints = []

    def meanwhile(*_: object) -> None:
        if not complaints:
            with pytest.raises(CheckpointError) as caught:
                convert(tiny_qwen3_dir, tmp_path / "result")
            complaints.append(str(caught.value))

    convert(tiny_qwen3_dir, tmp_path / "result", on_progress=meanwhile)

    assert "another conversion" in complaints[0] and verify(tmp_path / "result")


# ---- space and rights
# ---------------------------------------------------------------------------------------


def test_file_size_limit_ends_in_an_error_that_names_the_file(tiny_qwen3_dir: Path, tmp_path: Path):
    done = run_script(
        """
        import resource
        from ascend_kit.checkpoint.convert import convert
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            convert(sys.argv[1], sys.argv[2])
        except ValueError as error:
            print(error)
    """,
        tiny_qwen3_dir,
        tmp_path / "result",
    )

    assert "cannot write" in done.stdout and "model.safetensors" in done.stdout and "File too large" in done.stdout
    assert not (tmp_path / "result").exists()
    assert not list(partial(tmp_path / "result").glob("*.safetensors*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_that_is_too_small_is_refused_before_anything_is_written(tiny_qwen3_dir: Path, small_disk: Path):
    (small_disk / "ballast").write_bytes(bytes(900_000))

    with pytest.raises(CheckpointError, match=r"the result needs \d+ bytes, .* has \d+ free"):
        convert(tiny_qwen3_dir, small_disk / "result", precision="fp32")
    assert not (small_disk / "result").exists()


def test_disk_that_fills_up_on_the_way_is_an_error_and_can_be_resumed(tiny_qwen3_dir: Path, small_disk: Path):
    def fill(*_: object) -> None:
        # Room for the note about the finished shard, none for the next shard.
        if not (small_disk / "ballast").exists():
            (small_disk / "ballast").write_bytes(bytes(max(0, shutil.disk_usage(small_disk).free - 60_000)))

    with pytest.raises(
        CheckpointError, match=r"cannot write .*model-0000\d.*No space left on device.*kept for the next"
    ):
        convert(tiny_qwen3_dir, small_disk / "result", max_shard_bytes=SHARD_BYTES, on_progress=fill)

    assert not (small_disk / "result").exists()
    (small_disk / "ballast").unlink()
    result = convert(tiny_qwen3_dir, small_disk / "result", max_shard_bytes=SHARD_BYTES)
    assert result.resumed_shards and verify(result.folder, full=True)


def test_file_in_place_of_the_destination_is_refused(tiny_qwen3_dir: Path, tmp_path: Path):
    (tmp_path / "result").write_text("a file")

    with pytest.raises(CheckpointError, match="exists"):
        convert(tiny_qwen3_dir, tmp_path / "result", if_exists="overwrite")
    assert (tmp_path / "result").read_text() == "a file"


# ---- memory
# -------------------------------------------------------------------------------------------------


def sparse_model(folder: Path, num_layers: int) -> tuple[Path, int, int]:
    """A Qwen3 of zeros in bf16 that takes no disk space; returns folder, bytes in all, bytes of the largest
    tensor.
    """
    folder.mkdir()
    config = {
        "model_type": "qwen3",
        "num_hidden_layers": num_layers,
        "hidden_size": 1024,
        "head_dim": 128,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "intermediate_size": 4096,
        "vocab_size": 8192,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    header, offset, largest = {}, 0, 0
    for name, shape in expected_shapes(ModelConfig.from_dict(config)).items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset, largest = offset + size, max(largest, size)
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return folder, offset, largest


@pytest.mark.parametrize("quantize", ["none", "w8a8"])
def test_peak_memory_is_bound_by_the_largest_tensor_not_by_the_model(tmp_path: Path, quantize: str):
    source, total, largest = sparse_model(tmp_path / "source", num_layers=17)
    limit = 3 * largest + 500 * 2**20
    assert total > 1.1 * limit  # a converter that holds the model could not pass

    done = run_script(
        """
        from ascend_kit.checkpoint.convert import convert
        convert(sys.argv[1], sys.argv[2], quantize=sys.argv[3])
        # Not getrusage: its figure survives exec and would be that of the test runner.
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
        print(int(peak.split()[1]) * 1024)
    """,
        source,
        tmp_path / "result",
        quantize,
    )

    assert int(done.stdout) < limit
    shutil.rmtree(tmp_path / "result")
