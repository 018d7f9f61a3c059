"""Blocks and turns: no block with two owners, no step above its bound, first come first served, nobody starves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import Overloaded
from serving.engine.kv import BlockAllocator
from serving.engine.protocol import GenerationRequest, SamplingParams
from serving.engine.scheduler import Limits, Scheduler, Sequence


def sequence(prompt: int, max_tokens: int) -> Sequence:
    return Sequence(GenerationRequest("r", [0] * prompt, None, SamplingParams(max_tokens=max_tokens)))


sizes = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 12)), min_size=1, max_size=25)


@given(
    sizes=sizes,
    arrivals=st.lists(st.integers(0, 5), min_size=25, max_size=25),
    cancels=st.sets(st.integers(0, 24)),
    max_batch_tokens=st.integers(3, 40),
)
def test_every_schedule_keeps_its_promises(
    sizes: list[tuple[int, int]], arrivals: list[int], cancels: set[int], max_batch_tokens: int
) -> None:
    limits = Limits(max_batch_tokens, max_running=3, max_waiting=100, max_sequence_tokens=100)
    allocator = BlockAllocator(num_blocks=20, block_tokens=4)
    scheduler = Scheduler(limits, allocator)
    pending = [sequence(prompt, max_tokens) for prompt, max_tokens in sizes]
    order = {each: index for index, each in enumerate(pending)}
    started: list[int] = []
    turn = 0
    while pending or scheduler.sequences():
        for _ in range(arrivals[turn % len(arrivals)] or 1):
            if pending:
                scheduler.add(pending.pop(0))
        chunks = scheduler.plan()
        assert chunks, "there is work, and none is planned"
        assert sum(chunk.num_tokens for chunk in chunks) <= max_batch_tokens
        long = [chunk.num_tokens > 1 for chunk in chunks]
        assert long == sorted(long)
        assert len({chunk.sequence for chunk in chunks}) == len(chunks)
        planned = {chunk.sequence for chunk in chunks}
        assert all(each in planned for each in scheduler.running if each.remaining == 1), "a stream was held up"

        held = [block for each in scheduler.running for block in each.blocks]
        assert len(held) == len(set(held)) == allocator.num_used
        assert 0 not in held
        assert allocator.num_used + allocator.num_free == 20

        for chunk in chunks:
            mine = chunk.sequence
            assert chunk.start == mine.computed < chunk.end <= len(mine.tokens) <= mine.max_cached
            assert len(mine.blocks) * 4 >= chunk.end
            if chunk.start == 0:
                started.append(order[mine])
            mine.computed = chunk.end
            if chunk.samples:
                mine.tokens.append(0)
                if mine.num_generated == mine.request.params.max_tokens or order[mine] in cancels:
                    scheduler.finish(mine)
        turn += 1
        assert turn < 5000
    assert allocator.num_free == 20
    assert sorted(started) == list(range(len(sizes)))


@given(
    # Prompts from a small alphabet over three sets of weights, so that many begin alike.
    asked=st.lists(
        st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 1), min_size=1, max_size=24), st.integers(1, 12)),
        min_size=1,
        max_size=30,
    ),
    cancels=st.sets(st.integers(0, 29)),
)
def test_blocks_are_shared_by_what_begins_alike_under_the_same_weights_alone(
    asked: list[tuple[str, list[int], int]], cancels: set[int]
) -> None:
    """A model of the pool beside it: what each block's positions were computed from."""
    allocator = BlockAllocator(num_blocks=20, block_tokens=4)
    scheduler = Scheduler(
        Limits(12, max_running=3, max_waiting=100, max_sequence_tokens=100, prefix_cache=True), allocator
    )
    pool: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    order: dict[Sequence, int] = {}
    for index, (weights, prompt, max_tokens) in enumerate(asked):
        made = Sequence(GenerationRequest("r", prompt, None, SamplingParams(max_tokens=max_tokens)), weights)
        order[made] = index
        scheduler.add(made)
    shared = 0
    while scheduler.sequences():
        for chunk in scheduler.plan():
            mine = chunk.sequence
            if chunk.start == mine.shared:
                shared += mine.shared
                assert mine.shared < len(mine.request.prompt_ids)
            for position in range(chunk.start):  # everything it stands on was computed by its own weights and tokens
                held = pool[mine.blocks[position // 4]][position % 4]
                assert held == (mine.weights, tuple(mine.tokens[: position + 1]))
            for position in range(chunk.start, chunk.end):
                block = mine.blocks[position // 4]
                others = [each for each in scheduler.running if each is not mine and block in each.blocks]
                assert not others, "a block that others hold is written"
                pool.setdefault(block, [("", ())] * 4)[position % 4] = (
                    mine.weights,
                    tuple(mine.tokens[: position + 1]),
                )
            scheduler.advance(chunk)
            if chunk.samples:
                mine.tokens.append(len(mine.tokens) % 2)
                if mine.num_generated == mine.request.params.max_tokens or order[mine] in cancels:
                    scheduler.finish(mine)
        held_now = {block for each in scheduler.running for block in each.blocks}
        assert len(held_now) == allocator.num_used
        assert allocator.num_used + allocator.num_free == 20
    assert allocator.num_free == 20


def test_a_second_request_begins_behind_what_the_first_has_computed() -> None:
    scheduler = Scheduler(Limits(64, 8, 8, 100, prefix_cache=True), BlockAllocator(20, 4))
    prompt = list(range(13))
    for weights in ("a", "a", "b"):
        scheduler.add(Sequence(GenerationRequest("r", prompt, None, SamplingParams(max_tokens=2)), weights))
        (chunk,) = [each for each in scheduler.plan() if each.sequence.weights == weights and each.samples]
        scheduler.advance(chunk)
        chunk.sequence.tokens.append(0)
        scheduler.finish(chunk.sequence)
        assert chunk.start == (12 if weights == "a" and chunk.sequence.shared else 0)
    assert scheduler.allocator.share([]) == []


def test_the_head_of_the_queue_is_never_overtaken() -> None:
    scheduler = Scheduler(Limits(8, 8, 8, 100), BlockAllocator(10, 4))
    first, big, small = sequence(20, 5), sequence(30, 5), sequence(1, 1)
    for each in (first, big, small):
        scheduler.add(each)
    scheduler.plan()
    assert scheduler.running == [first]
    assert list(scheduler.waiting) == [big, small]
    scheduler.finish(first)
    scheduler.plan()
    assert scheduler.running == [big, small]


def test_prompts_share_a_step_while_others_want_some() -> None:
    scheduler = Scheduler(Limits(16, 8, 8, 1000), BlockAllocator(100, 4))
    for prompt in (200, 6, 5):
        scheduler.add(sequence(prompt, 2))
    assert [(len(each.sequence.tokens), each.num_tokens) for each in scheduler.plan()] == [(200, 8), (6, 6), (5, 2)]
    alone = Scheduler(Limits(16, 8, 8, 1000), BlockAllocator(100, 4))
    alone.add(sequence(200, 2))
    assert [each.num_tokens for each in alone.plan()] == [16]


def test_too_many_waiting_is_overloaded_and_changes_nothing() -> None:
    scheduler = Scheduler(Limits(8, 1, 2, 100), BlockAllocator(10, 4))
    for _ in range(2):
        scheduler.add(sequence(3, 3))
    with pytest.raises(Overloaded, match="2 requests wait"):
        scheduler.add(sequence(3, 3))
    scheduler.plan()
    scheduler.add(sequence(3, 3))
    assert len(scheduler.sequences()) == 3


def test_freeing_twice_is_a_bug_and_says_so() -> None:
    allocator = BlockAllocator(4, 4)
    blocks = allocator.allocate(3)
    allocator.free(blocks)
    with pytest.raises(AssertionError, match="freed before"):
        allocator.free(blocks)


def test_more_running_than_a_step_holds_is_refused_at_start() -> None:
    with pytest.raises(ValueError, match="max_running is 9"):
        Scheduler(Limits(8, 9, 8, 100), BlockAllocator(10, 4))
