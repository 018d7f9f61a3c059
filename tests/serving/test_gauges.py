"""What an answer's clock measures, whatever pieces the answer comes in."""

from hypothesis import given
from hypothesis import strategies as st

from serving.calls import ChoiceEvent
from serving.engine.protocol import TokenEvent
from serving.gauges import AnswerClock

events = st.builds(ChoiceEvent, st.integers(0, 3), st.builds(TokenEvent, st.none() | st.just(7), st.just("")))


@given(st.lists(st.lists(events)))
def test_tokens_are_counted_and_times_are_of_what_came(batches: list[list[ChoiceEvent]]) -> None:
    clock = AnswerClock(None)
    for batch in batches:
        clock.saw(batch)
    counts = [count for batch in batches if (count := sum(each.event.token_id is not None for each in batch))]
    assert clock.tokens == sum(counts)
    assert (clock.first_token_s is None) == (not counts)
    assert (clock.token_s is None) == (len(counts) < 2), "what came with the first says nothing"
    assert clock.first_token_s is None or clock.first_token_s >= 0
    assert clock.token_s is None or clock.token_s >= 0
