"""Block books under random operations, and prefix reuse by exact content."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_kit.engine.block_manager import BlockManager
from ascend_kit.engine.sequence import SamplingParams, ScoreTarget, Sequence


def sequence(tokens, targets=()):
    return Sequence(tokens, SamplingParams(), arrival_s=0.0, targets=targets)


def computed(manager, tokens):
    """A sequence whose every token is in the cache."""
    s = sequence(tokens)
    manager.match_prefix(s)
    assert manager.grow(s, len(tokens))
    manager.register(s, len(tokens))
    s.num_computed = len(tokens)
    return s


def test_block_zero_is_never_handed_out():
    manager = BlockManager(5, 4)

    s = computed(manager, list(range(16)))

    assert sorted(s.blocks) == [1, 2, 3, 4]
    assert not manager.grow(sequence([1]), 1)


def test_equal_prefixes_share_full_blocks_only():
    manager = BlockManager(20, 4)
    first = computed(manager, [1, 2, 3, 4, 5, 6, 7, 8, 9])

    second = sequence([1, 2, 3, 4, 5, 6, 7, 8, 9])
    manager.match_prefix(second)

    assert second.blocks == first.blocks[:2] and second.num_computed == 8
    assert manager.references[first.blocks[0]] == 2


def test_the_last_token_is_always_computed_again():
    manager = BlockManager(20, 4)
    computed(manager, [1, 2, 3, 4, 5, 6, 7, 8])

    second = sequence([1, 2, 3, 4, 5, 6, 7, 8])
    manager.match_prefix(second)

    assert second.num_computed == 4


def test_scored_rows_are_never_taken_from_the_cache():
    manager = BlockManager(20, 4)
    computed(manager, list(range(12)))

    scored = sequence(list(range(12)), [ScoreTarget(0, (1, 2, 3, 4, 5, 6))])
    manager.match_prefix(scored)

    assert scored.num_computed == 4  # rows 6 to 11 are scored, so only block 0 may be reused


def test_a_prefix_outlives_its_owner_until_its_room_is_needed():
    manager = BlockManager(4, 2)
    manager.release(computed(manager, [1, 2, 3, 4, 5]))

    again = sequence([1, 2, 3, 4, 5])
    manager.match_prefix(again)
    kept = again.num_computed
    manager.release(again)
    computed(manager, [9, 9, 9, 9, 9, 9])
    gone = sequence([1, 2, 3, 4, 5])
    manager.match_prefix(gone)

    assert kept == 4 and gone.num_computed == 0


def test_the_same_tokens_after_another_start_are_not_confused():
    manager = BlockManager(20, 2)
    computed(manager, [1, 2, 7, 7])

    other = sequence([3, 4, 7, 7, 5])
    manager.match_prefix(other)

    assert other.num_computed == 0


def test_reservation_takes_the_whole_length_at_once():
    manager = BlockManager(9, 4, on_demand=False, max_seq_length=16)
    first, second, third = sequence([1]), sequence([2]), sequence([3])

    assert manager.grow(first, 1) and manager.grow(second, 1) and not manager.grow(third, 1)
    assert len(first.blocks) == 4 and manager.num_free == 0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["start", "append", "release"]),
            st.integers(0, 7),
            st.lists(st.integers(0, 1), min_size=1, max_size=9),
        ),
        max_size=40,
    )
)
def test_books_balance_after_any_operations(operations):
    manager, live = BlockManager(8, 2), []
    for kind, number, tokens in operations:
        if kind == "start":
            s = sequence(tokens)
            manager.match_prefix(s)
            if manager.grow(s, len(tokens)):
                manager.register(s, len(tokens))
                live.append(s)
            else:
                manager.release(s)
        elif live and kind == "append":
            s = live[number % len(live)]
            s.token_ids += tokens
            if manager.grow(s, s.num_tokens):
                manager.register(s, s.num_tokens)
            else:
                del s.token_ids[-len(tokens) :]
        elif live:
            manager.release(live.pop(number % len(live)))

        manager.check(live)
        for s in live:
            assert len(s.blocks) == manager.blocks_for(s.num_tokens) and 0 not in s.blocks

    for s in live:
        manager.release(s)
    assert manager.num_free == manager.total
