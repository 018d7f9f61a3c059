"""What a replica asks of its engine."""

from types import SimpleNamespace

from cluster.records import AdapterRecord, BaseModelRef
from serving.calls import Call
from serving.engine.protocol import GenerationRequest, SamplingParams
from serving.replica import Replica
from tests.serving.test_demand import record

BASE = BaseModelRef(name="base", revision="r", licence="apache-2.0")


def asked(adapter: AdapterRecord | None, n: int = 1) -> list[GenerationRequest]:
    call = Call("c", BASE, None, ("a", "b"), adapter, n, SamplingParams(max_tokens=1, seed=5), 7, False)
    limits = SimpleNamespace(_weights={"support": 3.0, "base": 0.5}, _base=BASE, _max_tokens=lambda _, most: most)
    return Replica._requests(limits, call, [[1, 2], [3]])  # type: ignore[arg-type]


def test_each_choice_of_each_prompt_is_a_request_with_a_seed_of_its_own() -> None:
    requests = asked(record("support"), n=2)
    assert [each.prompt_ids for each in requests] == [[1, 2], [1, 2], [3], [3]]
    assert len({each.id for each in requests}) == 4
    assert [each.params.max_tokens for each in requests] == [7] * 4
    assert requests[0].params.seed != requests[1].params.seed
    assert {each.adapter for each in requests} == {record("support").digest}


def test_a_request_has_the_weight_of_its_adapter_by_name_or_of_the_base() -> None:
    assert [asked(each)[0].weight for each in (record("support"), record("other"), None)] == [3.0, 1.0, 0.5]
