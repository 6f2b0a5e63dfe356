"""Who is answered when: queue, places, memory and turns, without a model."""

import pytest

from radlads.inference.batching.scheduler import Piece, Scheduler, TooLarge


def scheduler_of(*lengths, rows=8, max_bytes=10**9, num_bytes=1):
    """With requests 0, 1, ... of these many tokens in its queue."""
    made = Scheduler(rows, max_bytes)
    for name, length in enumerate(lengths):
        made.submit(name, length, num_bytes)
    return made


def read(pieces):
    return [(piece.name, piece.start, piece.stop) for piece in pieces]


def test_those_that_came_first_are_admitted_while_there_are_rows():
    made = scheduler_of(5, 5, 5, rows=2)
    assert made.admit() == [0, 1] and made.admit() == []
    assert (made.num_waiting, made.num_running) == (1, 2)
    made.release(0)
    assert made.admit() == [2] and made.names() == [1, 2]


def test_a_large_request_waits_for_memory_and_is_not_overtaken():
    made = Scheduler(8, 10)
    for name, size in (("a", 6), ("large", 8), ("small", 1)):
        made.submit(name, 5, size)
    assert made.admit() == ["a"] and made.free_bytes == 4
    made.release("a")
    assert made.admit() == ["large", "small"] and made.free_bytes == 1


def test_a_request_larger_than_all_memory_is_refused_with_a_remedy():
    made = Scheduler(8, 10**9)
    with pytest.raises(TooLarge, match=r"needs 2 GB of state, but the server has 1 GB for all: .*--state-memory"):
        made.submit("a", 5, 2 * 10**9)
    assert made.names() == []


def test_a_short_prompt_is_read_after_one_piece_of_a_long_one():
    made = scheduler_of(10, 3)
    made.admit()
    turns = [read(made.pieces(4)) for _ in range(4)]
    assert turns == [[(0, 0, 4)], [(1, 0, 3), (0, 4, 5)], [(0, 5, 9)], [(0, 9, 10)]]
    assert made.pieces(4) == []


def test_short_prompts_share_a_turn_within_the_budget():
    made = scheduler_of(2, 1, 3, 9)
    made.admit()
    pieces = made.pieces(8)
    assert read(pieces) == [(0, 0, 2), (1, 0, 1), (2, 0, 3), (3, 0, 2)]
    assert [piece.is_whole for piece in pieces] == [True, True, True, False]
    assert made.pieces(8) == [Piece(3, 2, 9, is_last=True)]
    assert not Piece(3, 2, 9, is_last=True).is_whole


def test_every_prompt_is_read_once_and_in_order():
    lengths = [17, 1, 64, 5, 33]
    made, seen = scheduler_of(*lengths), dict.fromkeys(range(5), 0)
    made.admit()
    while pieces := made.pieces(7):
        assert 0 < sum(piece.stop - piece.start for piece in pieces) <= 7
        for piece in pieces:
            assert piece.start == seen[piece.name]
            seen[piece.name] = piece.stop
            assert piece.is_last == (piece.stop == lengths[piece.name])
    assert list(seen.values()) == lengths


def test_a_released_request_is_not_read_on_and_gives_its_place_back():
    made = scheduler_of(10, 10, 10, rows=2)
    made.admit()
    made.pieces(4)
    made.release(0)
    made.release(2)
    assert read(made.pieces(20)) == [(1, 0, 10)]
    assert made.names() == [1] and made.num_waiting == 0
    made.release(0)
    assert made.names() == [1]
