"""Which replica gets which request: pure bookkeeping, so every fault can be played in microseconds."""

from __future__ import annotations

import random

import pytest

from ascend_kit.engine.dispatcher import MAX_FAILURES, Dispatcher


def make(replicas=2, slots=4):
    dispatcher = Dispatcher(slots=slots, tokens_per_step=64, block_size=4)
    for number in range(replicas):
        dispatcher.add_replica(number)
    return dispatcher


def run_to_end(dispatcher, poison=(), lengths=None, draw=None, kill_chance=0.0):
    """Play all requests; replicas end of poisonous ones and at random. Returns finished and failed, and losses."""
    draw = draw or random.Random(0)
    finished, failed, losses, tokens = [], [], 0, {}
    while dispatcher.jobs:
        dispatcher.assign()
        for replica in list(dispatcher.replicas):
            running = list(dispatcher.replicas[replica].jobs)
            if any(number in poison for number in running) or (running and draw.random() < kill_chance):
                losses += 1
                failed += dispatcher.lose(replica)
                dispatcher.add_replica(replica)
                continue
            for number in running:
                tokens[number] = tokens.get(number, 0) + 1
                if tokens[number] >= (lengths or {}).get(number, 3):
                    dispatcher.remove(number)
                    finished.append(number)
                else:
                    dispatcher.prompt_computed(number)
    return finished, failed, losses


def test_requests_go_one_by_one_to_the_least_loaded_replica():
    dispatcher = make()
    for number in range(4):
        dispatcher.submit(number, [number] * 3)

    assert [replica for replica, _ in dispatcher.assign()] == [0, 1, 0, 1]


def test_a_replica_that_finishes_early_takes_more():
    dispatcher = make(slots=2)
    for number in range(9):
        dispatcher.submit(number, [number] * 3)
    first = {number: replica for replica, number in dispatcher.assign()}
    for number in [number for number, replica in first.items() if replica == 1]:
        assert dispatcher.remove(number) == 1

    second = [replica for replica, _ in dispatcher.assign()]

    assert len(first) == 6 and second == [1, 1, 1], "two slots and one waiting place each"


def test_a_long_prompt_counts_more_than_a_short_one_until_it_is_computed():
    dispatcher = make()
    dispatcher.submit(0, [1] * 640)
    dispatcher.submit(1, [2] * 3)
    dispatcher.submit(2, [3] * 3)
    placed = [replica for replica, _ in dispatcher.assign()]

    dispatcher.prompt_computed(0)

    assert placed == [0, 1, 1]
    assert dispatcher.replicas[0].load == pytest.approx(1.0)


def test_a_shared_prefix_prefers_the_replica_that_has_it():
    dispatcher = make()
    prefix = list(range(16))
    dispatcher.submit(0, [9] * 16)
    dispatcher.submit(1, [*prefix, 1])
    first = {number: replica for replica, number in dispatcher.assign()}
    dispatcher.remove(0)

    dispatcher.submit(2, [*prefix, 2])

    assert first == {0: 0, 1: 1}
    assert dispatcher.assign() == [(1, 2)], "although replica 0 is idle"


def test_a_shared_prefix_does_not_pile_everything_on_one_replica():
    dispatcher = make(slots=8)
    for number in range(16):
        dispatcher.submit(number, [*range(16), number])

    dispatcher.assign()

    assert min(dispatcher.in_flight(0), dispatcher.in_flight(1)) >= 6


def test_requests_of_a_lost_replica_go_first_and_one_at_a_time():
    dispatcher = make(replicas=1)
    for number in range(9):
        dispatcher.submit(number, [number])
    running = [number for _, number in dispatcher.assign()]

    failed = dispatcher.lose(0)
    dispatcher.add_replica(0)
    placed = [number for _, number in dispatcher.assign()]

    assert failed == [] and running == [0, 1, 2, 3, 4]
    assert placed == [0, 5, 6, 7, 8], "one that was running then, and fresh ones beside it"


@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_a_request_that_ends_every_replica_fails_with_the_second_and_all_others_finish(replicas, seed):
    draw = random.Random(seed)
    dispatcher = make(replicas)
    for number in range(40):
        dispatcher.submit(number, [draw.randrange(50) for _ in range(draw.randrange(1, 40))])
    lengths = {number: draw.randrange(1, 60) for number in range(40)}

    finished, failed, losses = run_to_end(dispatcher, {7}, lengths)

    assert failed == [7] and losses == MAX_FAILURES
    assert sorted(finished) == [number for number in range(40) if number != 7]


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_or_twice_whatever_ends_when(seed):
    draw = random.Random(seed)
    dispatcher = make(replicas=3)
    for number in range(60):
        dispatcher.submit(number, [draw.randrange(5) for _ in range(draw.randrange(1, 30))])
    lengths = {number: draw.randrange(1, 80) for number in range(60)}

    finished, failed, _ = run_to_end(dispatcher, lengths=lengths, draw=draw, kill_chance=0.02)

    assert sorted(finished + failed) == list(range(60))
    assert all(load.load == pytest.approx(0, abs=1e-9) and not load.jobs for load in dispatcher.replicas.values())


def test_losing_replicas_through_no_fault_of_a_request_never_fails_it():
    dispatcher = make(replicas=1)
    dispatcher.submit(0, [1, 2, 3])

    for _ in range(MAX_FAILURES + 1):
        assert dispatcher.assign() == [(0, 0)]
        assert dispatcher.lose(0, through_requests=False) == []
        dispatcher.add_replica(0)

    assert dispatcher.remove(0) is None and not dispatcher.again, "it can be cancelled while it waits for a replica"


def test_removing_a_waiting_request_leaves_the_others():
    dispatcher = make(replicas=0)
    for number in range(3):
        dispatcher.submit(number, [1])

    assert dispatcher.remove(1) is None
    assert [job.request_id for job in dispatcher.waiting] == [0, 2]
