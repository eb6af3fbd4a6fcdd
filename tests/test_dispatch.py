"""Which replica gets which request: pure bookkeeping, so every fault can be played in microseconds."""

from __future__ import annotations

import random

import pytest

from ascend_kit.engine.dispatch import MAX_DEATHS, PROBATION_TOKENS, Dispatcher


def make(replicas=2, slots=4):
    dispatcher = Dispatcher(slots=slots, tokens_per_step=64, block_size=4)
    for number in range(replicas):
        dispatcher.add_replica(number)
    return dispatcher


def run_to_end(dispatcher, poison=(), lengths=None, draw=None, kill_chance=0.0):
    """Play all jobs; replicas die of poisonous jobs and at random. Returns finished and failed tickets, and deaths."""
    draw = draw or random.Random(0)
    finished, failed, deaths = [], [], 0
    while dispatcher.has_unfinished:
        dispatcher.assign()
        for replica in list(dispatcher.places):
            jobs = list(dispatcher.places[replica].jobs.values())
            if any(job.ticket in poison for job in jobs) or (jobs and draw.random() < kill_chance):
                deaths += 1
                failed += [job.ticket for job in dispatcher.lose(replica)]
                dispatcher.add_replica(replica)
                continue
            for job in jobs:
                if job.tokens + 1 >= (lengths or {}).get(job.ticket, 3):
                    dispatcher.remove(job.ticket)
                    finished.append(job.ticket)
                else:
                    dispatcher.progressed(job.ticket, 1)
    return finished, failed, deaths


def test_requests_go_one_by_one_to_the_least_loaded_replica():
    dispatcher = make()
    for ticket in range(4):
        dispatcher.submit(ticket, [ticket] * 3)

    placed = dispatcher.assign()

    assert [replica for replica, _ in placed] == [0, 1, 0, 1]


def test_a_replica_that_finishes_early_takes_more():
    dispatcher = make(slots=2)
    for ticket in range(9):
        dispatcher.submit(ticket, [ticket] * 3)
    first = {job.ticket: replica for replica, job in dispatcher.assign()}
    for ticket in [ticket for ticket, replica in first.items() if replica == 1]:
        dispatcher.remove(ticket)

    second = [replica for replica, _ in dispatcher.assign()]

    assert len(first) == 6 and second == [1, 1, 1], "two slots and one waiting place each"


def test_a_long_prompt_counts_more_than_a_short_one_until_it_is_computed():
    dispatcher = make()
    dispatcher.submit(0, [1] * 640)
    dispatcher.submit(1, [2] * 3)
    dispatcher.submit(2, [3] * 3)
    placed = [replica for replica, _ in dispatcher.assign()]

    dispatcher.progressed(0, 1)

    assert placed == [0, 1, 1]
    assert dispatcher.load(0) == pytest.approx(1.0)


def test_a_shared_prefix_prefers_the_replica_that_has_it():
    dispatcher = make()
    prefix = list(range(16))
    dispatcher.submit(0, [9] * 16)
    dispatcher.submit(1, [*prefix, 1])
    first = {job.ticket: replica for replica, job in dispatcher.assign()}
    dispatcher.remove(0)

    dispatcher.submit(2, [*prefix, 2])

    assert first == {0: 0, 1: 1}
    assert [replica for replica, _ in dispatcher.assign()] == [1], "although replica 0 is idle"


def test_a_shared_prefix_does_not_pile_everything_on_one_replica():
    dispatcher = make(slots=8)
    for ticket in range(16):
        dispatcher.submit(ticket, [*range(16), ticket])

    dispatcher.assign()

    assert min(dispatcher.in_flight(0), dispatcher.in_flight(1)) >= 6


def test_jobs_of_a_dead_replica_are_tried_again_alone():
    dispatcher = make(replicas=1)
    for ticket in range(3):
        dispatcher.submit(ticket, [ticket])
    dispatcher.assign()

    guilty = dispatcher.lose(0)
    dispatcher.add_replica(0)
    placed = dispatcher.assign()

    assert guilty == []
    assert [job.ticket for _, job in placed] == [0]


def test_a_cleared_suspect_makes_room_for_the_next_and_keeps_its_tokens():
    dispatcher = make(replicas=1)
    for ticket in range(2):
        dispatcher.submit(ticket, [ticket])
    dispatcher.assign()
    dispatcher.progressed(0, 5)
    dispatcher.lose(0)
    dispatcher.add_replica(0)
    dispatcher.assign()

    taken_back = [dispatcher.progressed(0, 1) for _ in range(PROBATION_TOKENS)]
    placed = [job.ticket for _, job in dispatcher.assign()]

    assert taken_back == [False] * (PROBATION_TOKENS - 1) + [True]
    assert placed == [1]
    assert dispatcher.jobs[0].tokens == 5 + PROBATION_TOKENS


@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_a_poisonous_request_ends_two_replicas_and_all_others_finish(replicas, seed):
    draw = random.Random(seed)
    dispatcher = make(replicas)
    for ticket in range(40):
        dispatcher.submit(ticket, [draw.randrange(50) for _ in range(draw.randrange(1, 40))])
    lengths = {ticket: draw.randrange(1, 60) for ticket in range(40)}

    finished, failed, deaths = run_to_end(dispatcher, {7}, lengths)

    assert failed == [7] and deaths == 2
    assert sorted(finished) == [ticket for ticket in range(40) if ticket != 7]


def test_two_poisonous_requests_at_once_blame_nobody_else():
    dispatcher = make()
    for ticket in range(12):
        dispatcher.submit(ticket, [ticket])

    finished, failed, deaths = run_to_end(dispatcher, {1, 2})

    assert sorted(failed) == [1, 2] and len(finished) == 10 and deaths <= 4


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_or_twice_whatever_dies_when(seed):
    draw = random.Random(seed)
    dispatcher = make(replicas=3)
    for ticket in range(60):
        dispatcher.submit(ticket, [draw.randrange(5) for _ in range(draw.randrange(1, 30))])
    lengths = {ticket: draw.randrange(1, 80) for ticket in range(60)}

    finished, failed, _ = run_to_end(dispatcher, lengths=lengths, draw=draw, kill_chance=0.02)

    assert sorted(finished + failed) == list(range(60))
    assert all(place.load == pytest.approx(0, abs=1e-9) and not place.jobs for place in dispatcher.places.values())


def test_a_job_that_is_near_too_many_deaths_is_given_up():
    dispatcher = make(replicas=1)
    job = dispatcher.submit(0, [1])

    for death in range(MAX_DEATHS):
        dispatcher.assign()
        guilty = dispatcher.lose(0)
        dispatcher.add_replica(0)
        job.strikes = 0
        if death < MAX_DEATHS - 1:
            assert guilty == []

    assert guilty == [job] and not dispatcher.has_unfinished


def test_removing_a_waiting_job_leaves_the_others():
    dispatcher = make(replicas=0)
    for ticket in range(3):
        dispatcher.submit(ticket, [1])

    where = dispatcher.remove(1)

    assert where is None
    assert [job.ticket for job in dispatcher.waiting] == [0, 2]
