"""Even shares, ranks of the environment, and steps told to other ranks."""

from __future__ import annotations

import queue

import pytest
import torch

from ascend_kit import AscendInferEngine
from ascend_kit.device.parallel import StepChannel, TensorParallel, check_division, prefer_vector_cores
from ascend_kit.engine.ranks import environment_ranks, without_ranks
from ascend_kit.engine.runner import StepInputs
from ascend_kit.engine.scheduler import Chunk
from ascend_kit.engine.sequence import SamplingParams, Sequence


def test_shares_cover_everything_once():
    spans = [TensorParallel(rank, 4).span(28, "num_attention_heads") for rank in range(4)]

    assert spans == [(0, 7), (7, 14), (14, 21), (21, 28)]


def test_counts_that_do_not_divide_name_every_size_that_works():
    with pytest.raises(ValueError, match=r"tensor_parallel=8 does not divide .*num_key_value_heads=4.*\[1, 2, 4\]"):
        check_division(8, {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064})


def test_the_engine_refuses_counts_that_do_not_divide_before_anything_starts(tiny_qwen3_dir):
    with pytest.raises(ValueError, match=r"num_key_value_heads=2; allowed: \[1, 2\]"):
        AscendInferEngine(tiny_qwen3_dir, cards=4, tensor_parallel=4, max_seq_length=64)
    with pytest.raises(ValueError, match=r"tensor_parallel=2 does not divide cards=3; allowed: \[1, 3\]"):
        AscendInferEngine(tiny_qwen3_dir, cards=3, tensor_parallel=2, max_seq_length=64)


@pytest.mark.parametrize(
    "names",
    [
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ],
)
def test_ranks_of_a_launcher_are_read(names):
    env = dict(zip(names, ("5", "8", "1"), strict=True))

    ranks = environment_ranks(env)

    assert ranks[:3] == (5, 8, 1)
    assert without_ranks({**env, "HOME": "/home"}) == {"HOME": "/home"}


def test_a_process_alone_has_no_ranks():
    assert environment_ranks({}) is None
    assert environment_ranks({"RANK": "0", "WORLD_SIZE": "1"}) is None


def test_the_command_line_runs_once_under_a_launcher_with_the_cards_of_all_ranks(monkeypatch, capsys):
    from ascend_kit import __main__ as command

    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "2")
    assert command._as_one_process(["run", "x.yaml"]) is None

    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    assert command._as_one_process(["run", "x.yaml"]) == ["run", "x.yaml", "--set", "cards=4"]
    assert environment_ranks() is None, "kernels started from here run alone"
    assert "rank 0 works" in capsys.readouterr().err


def test_ranks_that_make_no_sense_are_an_error():
    with pytest.raises(ValueError, match="do not fit together"):
        environment_ranks({"RANK": "4", "WORLD_SIZE": "4", "LOCAL_RANK": "0"})
    with pytest.raises(ValueError, match="not whole numbers"):
        environment_ranks({"RANK": "one", "WORLD_SIZE": "4"})


@pytest.mark.parametrize("count", [1, 15, 16, 500])
def test_a_message_of_any_length_arrives(monkeypatch, count):
    wire: queue.Queue = queue.Queue()
    sender, receiver = StepChannel(TensorParallel(0, 2), capacity=16), StepChannel(TensorParallel(1, 2), capacity=16)
    monkeypatch.setattr(sender, "_broadcast", lambda tensor: wire.put(tensor.clone()))
    monkeypatch.setattr(receiver, "_broadcast", lambda tensor: tensor.copy_(wire.get_nowait()))
    message = torch.arange(count, dtype=torch.int32)

    sender.send(message)
    arrived = receiver.receive().clone()
    sender.close()

    assert torch.equal(arrived, message)
    assert receiver.receive() is None and wire.empty()


def test_a_step_is_the_same_after_its_journey():
    sequences = [Sequence(range(length), SamplingParams(), arrival_s=0.0) for length in (5, 9)]
    sequences[0].blocks, sequences[1].blocks = [3, 4], [7, 1, 5]
    chunks = [Chunk(sequences[0], 4, 1), Chunk(sequences[1], 0, 9)]

    sent = StepInputs.from_chunks(chunks, 4, scored=[2, 3], sampled=[0], graph=0)
    got = StepInputs.from_message(sent.to_message())

    assert (got.ends, got.lengths, got.scored, got.sampled, got.graph) == ([1, 10], [5, 9], [2, 3], [0], 0)
    assert torch.equal(got.buffer, sent.buffer)
    ids, positions, meta = got.tensors(torch.device("cpu"), 4, None)
    assert ids.tolist() == [4, *range(9)] and positions.tolist() == [4, *range(9)]
    assert meta.slot_mapping.tolist() == [16, 28, 29, 30, 31, 4, 5, 6, 7, 20]
    assert meta.block_table.tolist() == [[3, 4, 0], [7, 1, 5]]


@pytest.mark.parametrize(
    ("kind", "size", "is_one_host", "env", "mode"),
    [
        ("npu", 2, True, {}, "AIV"),
        ("npu", 8, True, {"HCCL_DETERMINISTIC": "false"}, "AIV"),
        ("npu", 4, True, {"HCCL_OP_EXPANSION_MODE": "AI_CPU"}, "AI_CPU"),
        ("npu", 4, True, {"HCCL_DETERMINISTIC": "TRUE"}, None),
        ("npu", 4, False, {}, None),
        ("npu", 16, True, {}, None),
        ("npu", 1, True, {}, None),
        ("cuda", 2, True, {}, None),
    ],
)
def test_collectives_run_on_vector_cores_where_that_is_allowed_and_nothing_else_was_asked(
    kind, size, is_one_host, env, mode
):
    assert prefer_vector_cores(kind, size, is_one_host, env) is (mode == "AIV")
    assert env.get("HCCL_OP_EXPANSION_MODE") == mode
