"""The loop closed over a real S3 server: a job trains and publishes there, a submitted deployment serves from there."""

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster import keys, metrics, records, registry
from cluster.nodes import LocalCluster
from cluster.processes import free_ports
from scripts.demo.monitor import DISCOVERY, Prometheus
from tests.conftest import TinyModels
from tests.e2e.conftest import Pair
from tests.e2e.submit import DEADLINE_S, start, submit, write_recipe

NAMES = ("pair-one", "pair-two")
QUESTION = "Please send three red lamps to Mira in Oslo by Friday."


@pytest.fixture(scope="module")
def url(ray_cluster: LocalCluster, pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An endpoint, deployed by a submitted job, over the store that other jobs have trained into."""
    folder = tmp_path_factory.mktemp("loop")
    config = folder / "serving.yaml"
    (port,) = free_ports(1)
    config.write_text(
        f"""
name: loop
model: {{name: tiny-test, source: store, licence: apache-2.0, dtype: fp32}}
store: {pair.store.url}
engine: {{max_context: 512, kv_tokens: 4096}}
http: {{port: {port}}}
replicas: {{cpus: 0.5}}
"""
    )
    deployed = submit(ray_cluster, "python", "-m", "serving", "deploy", str(config))
    assert deployed.code == 0, deployed.output
    yield f"http://127.0.0.1:{port}/v1"
    submit(ray_cluster, "python", "-m", "serving", "shutdown")


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as opened:
        yield opened


def test_what_was_trained_answers_from_the_store(
    client: openai.OpenAI, pair: Pair, tiny_models: TinyModels, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["qwen3"])
    turns = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    for name in NAMES:
        record = registry.resolve(pair.store, name)
        records.fetch_files(pair.store, keys.adapter_version_prefix(name, 1), record.files, tmp_path / name)
        base = AutoModelForCausalLM.from_pretrained(tiny_models["qwen3"])
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / name)
        with torch.no_grad():
            out = adapted.generate(**ids, max_new_tokens=24, do_sample=False)
        expected = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        raw = client.chat.completions.with_raw_response.create(
            model=name,
            messages=turns,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=24,
        )
        assert raw.headers["x-luthier-adapter"] == f"{name}@1"
        assert raw.headers["x-luthier-digest"] == record.digest
        assert raw.parse().choices[0].message.content == expected


def test_the_endpoint_lists_what_the_store_has_and_refuses_what_it_has_not(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} >= {"tiny-test", *NAMES}
    with pytest.raises(openai.NotFoundError, match=r"pair-one.*pair-two"):
        client.completions.create(model="nobody", prompt="x")


def test_every_metric_that_is_named_is_in_a_live_scrape(
    client: openai.OpenAI, ray_cluster: LocalCluster, pair: Pair, tiny_models: TinyModels, rows: Path, tmp_path: Path
) -> None:
    """What dashboards and alerts ask for is what a cluster exports that trains and serves, by a real Prometheus."""
    if shutil.which("prometheus") is None:
        pytest.skip("no prometheus; Debian's package is `prometheus`, and `scripts/test` installs it as root")
    recipe = write_recipe(tmp_path, tiny_models["qwen3"], [rows], name="watched", store=pair.store.url)
    # A GPU type, without one: what a share of its peak is named for. A price for cores, since no GPU is held.
    prices = ("cluster.gpu=l4-24gb", "cluster.prices.cpu=0.04", "limits.hours=10")
    steps = ("train.steps=400", "checkpoint.every_steps=50", *prices)
    with Prometheus(ray_cluster.folder / "0" / DISCOVERY, tmp_path) as prometheus:
        training = start(ray_cluster, "jobs", "train", str(recipe), *steps)
        wanted = {metric.exported: metric for metric in metrics.ALL}

        def ask(number: int) -> None:
            name = NAMES[number % len(NAMES)]
            client.completions.create(model=name, prompt=QUESTION * 4, max_tokens=16, temperature=0)

        def missing() -> set[str]:
            with ThreadPoolExecutor(4) as pool:  # at once, so that passes are mixed; again, so that prompts are shared
                list(pool.map(ask, range(4)))
            return wanted.keys() - prometheus.names()

        deadline = time.monotonic() + DEADLINE_S  # the training may end before the last of the endpoint's are exported
        while names := missing():
            assert time.monotonic() < deadline, f"never scraped: {names}; the job: {training.poll()}"
        for name, metric in wanted.items():
            labels = {label for series in prometheus.get("series", **{"match[]": name}) for label in series}
            assert set(metric.labels) <= labels, name
        output = training.communicate()[0]
        assert training.returncode == 0, output
        states = {rule["name"]: rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]}
        assert {rule["health"] for rule in states.values()} == {"ok"}
