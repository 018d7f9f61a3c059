"""Workers killed −9 at the worst moments, and a server that is away: the run ends with the losses of a calm one."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import keys, records
from cluster.nodes import LocalCluster
from cluster.records import RunRecord
from jobs import checkpoint, runs
from tests.conftest import TinyModels
from tests.faults.field import Field
from tests.faults.proxy import Proxy
from tests.faults.ranks import Ranks
from tests.servers import S3Server

STEPS, EVERY, WORKERS = 24, 2, 2
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def field(
    ray_cluster: LocalCluster,
    s3: S3Server,
    tiny_models: TinyModels,
    rows: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Field:
    recipes = {"lora": (tiny_models["qwen3"], "{kind: lora, rank: 64}")}
    return Field(ray_cluster, s3, tmp_path_factory.mktemp("kills"), recipes, rows)


@pytest.fixture(scope="module")
def calm(field: Field) -> list[float]:
    record = field.new_run("lora", "calm", steps=STEPS, every=EVERY)
    field.start(record, 1, 0).wait()
    return losses(field, record)


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[Proxy]:
    with Proxy(s3.host, s3.port) as opened:
        yield opened


def losses(field: Field, record: RunRecord) -> list[float]:
    steps = list(runs.read_steps(field.store, record.run_id))
    assert [step["step"] for step in steps] == list(range(STEPS))
    return [step["loss"] for step in steps]


def wait_until(condition: Callable[[], bool], ranks: Ranks) -> None:
    while not condition():
        assert ranks.is_alive(), ranks.wait()
        time.sleep(0.01)


@pytest.mark.parametrize("seconds", [6, pytest.param(60, marks=pytest.mark.long)])
def test_an_outage_of_the_store_is_sat_out_and_told(
    field: Field, calm: list[float], proxy: Proxy, seconds: int
) -> None:
    record = field.new_run("lora", f"outage-{seconds}", steps=STEPS, every=EVERY)
    ranks = field.start(record, WORKERS, 1, f"http://127.0.0.1:{proxy.port}")
    wait_until(lambda: bool(runs.checkpoint_steps(field.store, record.run_id)), ranks)
    proxy.refuse()
    time.sleep(seconds)
    assert ranks.is_alive(), ranks.wait()
    proxy.heal()
    ranks.wait()
    assert losses(field, record) == pytest.approx(calm, abs=TOLERANCE, rel=0)
    told = [event.text for event in runs.read_events(field.store, record.run_id) if "out of reach" in event.text]
    assert told
    assert runs.checkpoint_steps(field.store, record.run_id)[-1] == STEPS


def test_a_checkpoint_of_another_method_is_refused_by_every_rank(field: Field, calm: list[float]) -> None:
    key = keys.run_record("calm")
    record = records.read(field.store, key, RunRecord)
    before = runs.checkpoint_steps(field.store, "calm")
    method = {**record.recipe["method"], "rank": 32}
    narrow = record.model_copy(update={"recipe": {**record.recipe, "method": method}})
    with pytest.raises(AssertionError, match="another model, method or release of the model's code"):
        field.start(narrow, WORKERS, 1).wait()
    assert runs.checkpoint_steps(field.store, "calm") == before


@pytest.mark.long
def test_a_store_that_stays_away_ends_the_run_with_its_name(field: Field, proxy: Proxy) -> None:
    record = field.new_run("lora", "gone", steps=10_000, every=EVERY, store_patience_s=5.0)
    ranks = field.start(record, WORKERS, 1, f"http://127.0.0.1:{proxy.port}")
    wait_until(lambda: bool(runs.checkpoint_steps(field.store, record.run_id)), ranks)
    proxy.refuse()
    with pytest.raises(AssertionError, match="StoreUnreachable"):
        ranks.wait()
    assert checkpoint.newest_whole(field.store, record.run_id).restored


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_at_the_worst_moments_it_ends_the_same(field: Field, calm: list[float], proxy: Proxy, seed: int) -> None:
    """In the upload, between shards and manifest, in the resume itself, and in some step."""
    chance = random.Random(seed)
    record = field.new_run("lora", f"killed-{seed}", steps=STEPS, every=EVERY)
    endpoint = f"http://127.0.0.1:{proxy.port}"
    prefix = keys.checkpoints_prefix(record.run_id)

    def in_the_upload(ranks: Ranks) -> None:
        hit = threading.Event()
        proxy.cut("up", after_bytes=chance.randrange(200_000, 1_000_000), then=hit.set)
        wait_until(hit.is_set, ranks)

    def between_shards_and_manifest(ranks: Ranks) -> None:
        proxy.delay(0.05)

        def is_torn() -> bool:
            names = {item.key.removeprefix(prefix) for item in field.store.list(prefix)}
            steps = {name.split("/")[0] for name in names}
            return any(f"{step}/manifest.json" not in names for step in steps)

        wait_until(is_torn, ranks)

    def in_the_resume(ranks: Ranks) -> None:
        hit = threading.Event()
        proxy.cut("down", after_bytes=chance.randrange(1_000, 8_000), then=hit.set)
        wait_until(hit.is_set, ranks)

    def in_some_step(ranks: Ranks) -> None:
        before = set(runs.checkpoint_steps(field.store, record.run_id))
        wait_until(lambda: bool(set(runs.checkpoint_steps(field.store, record.run_id)) - before), ranks)
        time.sleep(chance.uniform(0, 0.2))

    moments = [in_the_upload, between_shards_and_manifest, in_the_resume, in_some_step]
    chance.shuffle(moments)
    for moment in moments:
        ranks = field.start(record, WORKERS, chance.choice((1, 2, 3)), endpoint)
        moment(ranks)
        ranks.kill()
        proxy.heal()
    field.start(record, WORKERS, 1, endpoint).wait()
    assert losses(field, record) == pytest.approx(calm, abs=TOLERANCE, rel=0)
    assert len(runs.attempts(field.store, record.run_id)) >= 2
