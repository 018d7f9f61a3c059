"""Into the store: from each kind of source, pinned, judged, and on where it was killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cluster import keys, models, records
from cluster.catalogue.add import Added, add
from cluster.catalogue.source import Wanted
from cluster.cli import app
from cluster.config import load
from cluster.errors import ConfigError, LicenceRefused, ModelError
from cluster.folder import FolderStore
from cluster.licences.gate import Gate
from cluster.models import ModelConfig
from cluster.records import Artefact
from cluster.s3 import S3Store
from jobs.model import load_model
from tests.cluster.hub import COMMIT, hub
from tests.conftest import TinyModels
from tests.faults.proxy import Proxy
from tests.servers import REPOSITORY, aws_env, shared

GATE = Gate.here()


@pytest.fixture
def folder(tiny_models: TinyModels, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(tiny_models["qwen3"], copy)
    (copy / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return copy


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


def into(store: FolderStore, source: Path | str, said: list[str] | None = None, **wanted: object) -> Added:
    options = {"name": "tiny", **wanted}
    config_out = options.pop("config_out", None)
    assert config_out is None or isinstance(config_out, Path)
    heard: list[str] = [] if said is None else said
    return add(Wanted(str(source), **options), store, GATE, heard.append, config_out)  # type: ignore[arg-type]


def luthier(*arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "cluster", "models", *arguments]
    return subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


def test_a_folder_is_pinned_by_its_digest_and_can_be_trained(folder: Path, store: FolderStore, tmp_path: Path) -> None:
    config = tmp_path / "configs" / "tiny.yaml"
    added = into(store, folder, config_out=config)
    model = load(config, ModelConfig)
    assert (model.source, model.revision, model.dtype) == ("store", added.revision, "fp32")
    assert model.shape == models.read_shape(folder)
    base = models.pin(model, store)
    fetched = models.fetch(model, base, store)
    assert load_model(fetched, "fp32").num_parameters() == load_model(folder, "fp32").num_parameters()
    manifest = models.read_manifest(store, base)
    assert models.digest_revision(manifest.files) == added.revision
    assert manifest.licence == "apache-2.0"  # the card's
    again: list[str] = []
    assert into(store, folder, again, revision=added.revision).revision == added.revision
    assert not [line for line in again if "uploaded" in line]


def test_what_is_refused_leaves_nothing_in_the_store(folder: Path, store: FolderStore, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has the digest \w{40}, and --revision asks for"):
        into(store, folder, revision="0" * 40)
    with pytest.raises(LicenceRefused, match="does not allow commercial use"):
        into(store, folder, licence="cc-by-nc-4.0")
    with pytest.raises(LicenceRefused, match="nothing is known of the licence"):
        into(store, folder, licence="my-own-words")
    with pytest.raises(ConfigError, match="use lower case"):
        into(store, folder, name="My Model")
    with pytest.raises(ConfigError, match="exists; name another"):
        into(store, folder, config_out=folder / "config.json")
    with pytest.raises(ConfigError, match="--convert makes others"):
        into(store, folder, convert=True, revision="0" * 40)
    with pytest.raises(ConfigError, match="is no folder here"):
        into(store, "nowhere")
    (folder / "README.md").unlink()
    with pytest.raises(ModelError, match="give it by --licence"):
        into(store, folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(ModelError, match="is not added:\n  fault: weights"):
        into(store, folder, licence="mit")
    assert list(store.list("")) == []


def test_a_record_does_not_change_its_licence(folder: Path, store: FolderStore) -> None:
    into(store, folder)
    with pytest.raises(LicenceRefused, match=r"under apache-2\.0 and not mit"):
        into(store, folder, licence="mit")


def test_a_record_does_not_change_what_it_was_made_from(folder: Path, store: FolderStore) -> None:
    into(store, folder)
    card = "---\nlicense: apache-2.0\n{}---\n"
    (folder / "README.md").write_text(card.format("pipeline_tag: text-generation\n"))
    into(store, folder)  # the same, but for what its card had not said
    (folder / "README.md").write_text(card.format("base_model: google/gemma-3-1b-it\n"))
    with pytest.raises(LicenceRefused, match=r"only one of its record and this source names base google/gemma-3-1b-it"):
        into(store, folder)
    into(store, folder, name="gemma")
    (folder / "README.md").write_text(card.format(""))
    with pytest.raises(LicenceRefused, match=r"names base google/gemma-3-1b-it \(gemma\); a record does not change"):
        into(store, folder, name="gemma")


def test_what_something_was_made_from_is_told_once(folder: Path, store: FolderStore) -> None:
    (folder / "README.md").write_text("---\nlicense: apache-2.0\npipeline_tag: text-generation\n---\n")
    into(store, folder)
    known = Artefact(kind="base", name="tiny", licence="apache-2.0", is_multimodal=False)
    chain = models.mirrored(store)[0].chain
    assert chain == (known,)
    unknown = known.model_copy(update={"is_multimodal": None})
    assert GATE.notice([unknown, *chain, unknown]).count("base: tiny") == 1
    both = (known, known.model_copy(update={"is_multimodal": True}))
    assert records.distinct([unknown, *both]) == both, "cards that contradict each other are both kept"


@pytest.mark.parametrize("convert", [False, True])
def test_what_a_link_leads_to_never_reaches_the_store(
    folder: Path, store: FolderStore, tmp_path: Path, convert: bool
) -> None:
    (tmp_path / "credentials").write_text("secret")
    (folder / "merges.txt").symlink_to(tmp_path / "credentials")
    if convert:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    refused = r"merges\.txt -> .*credentials is a link out of the folder"
    with pytest.raises(ModelError, match=refused):
        into(store, folder, convert=convert)
    recipe = ModelConfig(name="tiny", source=str(folder), revision=None, licence="mit", shape=None)
    with pytest.raises(ModelError, match=refused):  # a job that uses the folder mirrors it too
        models.pin(recipe, store)
    assert list(store.list("")) == []


def test_a_hub_caches_own_links_are_followed(folder: Path, store: FolderStore, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (blobs := tmp_path / "models--me--tiny" / "blobs").mkdir()
    for number, path in enumerate(folder.iterdir()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert into(store, snapshot).inspection.is_usable
    (blobs / "99").symlink_to("/etc/passwd")  # a cache that a stranger packed
    (snapshot / "notes.txt").symlink_to("../../blobs/99")
    with pytest.raises(ModelError, match=r"notes\.txt -> /etc/passwd is a link"):
        into(store, snapshot)


def test_pickles_are_refused_and_then_converted(folder: Path, store: FolderStore) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="add it with --convert"):
        into(store, folder)
    added = into(store, folder, convert=True)
    assert yaml.safe_load(added.config)["dtype"] == "fp32"  # what is in the pickle
    model = ModelConfig(name="tiny", source="store", revision=added.revision, licence="apache-2.0", shape=None)
    base = models.pin(model, store)
    found = load_file(models.fetch(model, base, store) / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(found[name].equal(tensors[name]) for name in tensors)
    assert models.read_manifest(store, base).source.endswith("converted from pickles")
    assert into(store, folder, convert=True).revision == added.revision  # the same bytes each time
    assert not [path for path in (models.cache_folder() / "converting").iterdir() if path.is_dir()]


def test_a_model_of_another_store_keeps_its_pin_and_its_past(folder: Path, store: FolderStore, tmp_path: Path) -> None:
    first = into(store, folder)
    other = FolderStore(tmp_path / "other")
    assert into(other, store.url).revision == first.revision
    mine, theirs = (models.mirrored(each)[0] for each in (other, store))
    assert (mine.files, mine.chain, mine.source) == (theirs.files, theirs.chain, theirs.source)
    with pytest.raises(ModelError, match=r"holds no model else; its models: tiny"):
        into(FolderStore(tmp_path / "third"), store.url, name="else")


def test_files_that_are_there_are_read_back_and_only_what_differs_is_sent(folder: Path, store: FolderStore) -> None:
    added = into(store, folder)
    prefix = keys.model_prefix("tiny", added.revision)
    there = Path(store.url.removeprefix("file://")) / prefix
    before = {path.name: path.stat().st_mtime_ns for path in there.iterdir()}
    (there / "model.json").unlink()  # killed before the commit, with one file lost, one cut off, one damaged
    (there / "config.json").unlink()
    (there / "tokenizer.json").write_bytes(b"{")
    whole = bytearray((there / "model.safetensors").read_bytes())
    whole[-1] ^= 1
    (there / "model.safetensors").write_bytes(whole)
    said: list[str] = []
    assert into(store, folder, said).revision == added.revision
    sent = {"config.json", "tokenizer.json", "model.safetensors"}
    assert {line.partition(":")[0] for line in said if "uploaded" in line} == sent
    after = {path.name: path.stat().st_mtime_ns for path in there.iterdir()}
    assert {name for name in before if before[name] == after[name]} == set(before) - sent - {"model.json"}
    assert (there / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_an_add_that_is_killed_goes_on_where_it_stood(
    folder: Path, tmp_path: Path, use_env: Callable[[dict[str, str]], None]
) -> None:
    """SIGKILL in the middle of a shard's upload to a real S3 server; what had arrived is not sent a second time."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | {"more": 1}))
    generator = np.random.default_rng(0)
    weight_map = dict.fromkeys(tensors, "model-1-of-5.safetensors")
    save_file(tensors, folder / "model-1-of-5.safetensors")
    for number in range(2, 6):  # noise that does not compress, of 2 MB each
        name = f"extra.{number}"
        weight_map[name] = f"model-{number}-of-5.safetensors"
        save_file({name: torch.from_numpy(generator.standard_normal(250_000))}, folder / weight_map[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    server = shared("ministack")
    use_env(server.env)
    store = S3Store(server.bucket, tmp_path.name)
    url = f"s3://{server.bucket}/{tmp_path.name}"
    with Proxy("127.0.0.1", server.port) as proxy:
        env = aws_env(f"http://127.0.0.1:{proxy.port}", server.access_key, server.secret_key)
        command = [sys.executable, "-m", "cluster", "models", "add", str(folder), "--name", "tiny", "--store", url]
        killed = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, **env}, stdout=subprocess.DEVNULL)
        proxy.cut("up", after_bytes=5_500_000, then=lambda: os.kill(killed.pid, signal.SIGKILL))
        assert killed.wait(timeout=60) == -signal.SIGKILL
        assert proxy.fired == 1
        there = {item.key.rpartition("/")[2] for item in store.list("models/")}
        shards = {name for name in there if name.startswith("model-")}
        assert 2 <= len(shards) <= 4
        assert "model.json" not in there
        proxy.cut("up", after_bytes=2_000_000 * (5 - len(shards)) + 900_000)  # one shard more would break off
        done = luthier("add", str(folder), "--name", "tiny", "--store", url, **env)
        assert proxy.fired == 1
    assert done.returncode == 0, done.stderr
    assert {line.partition(":")[0] for line in done.stdout.splitlines() if "already there" in line} == there
    manifest = models.mirrored(store)[0]
    records.fetch_files(store, f"models/tiny/{manifest.revision}/", manifest.files, tmp_path / "back")


def test_a_hub_model_is_pinned_to_the_commit_that_is_newest_now(
    folder: Path, store: FolderStore, tmp_path: Path
) -> None:
    (folder / "mine.py").write_text("raise SystemExit")
    (folder / "optimizer.pt").write_bytes(b"\x80")
    config = tmp_path / "tiny.yaml"
    with hub(folder) as address:
        env = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        env["HF_HUB_DISABLE_TELEMETRY"] = "1"
        done = luthier("add", "me/tiny", "--store", store.url, "--config-out", str(config), "--json", **env)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["revision"] == COMMIT
        gated = luthier("inspect", "me/gated", **env)
    assert gated.returncode == 2
    assert "me/gated is gated: accept its licence" in gated.stderr
    with pytest.raises(ConfigError, match="'main' moves; pin the commit"):
        into(store, "me/tiny", revision="main")
    assert yaml.safe_load(config.read_text())["source"] == "me/tiny"
    manifest = models.mirrored(store)[0]
    assert (manifest.name, manifest.revision, manifest.source) == ("tiny", COMMIT, f"me/tiny@{COMMIT}")
    names = {file.file for file in manifest.files}
    assert "model.safetensors" in names
    assert not names & {"mine.py", "optimizer.pt"}
    assert not list((tmp_path / "hf").rglob("mine.py"))  # not even fetched


def test_a_hub_model_in_pickles_is_converted_and_served_from_the_store(
    folder: Path, store: FolderStore, tmp_path: Path
) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with hub(folder) as address:
        env = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        command = ["add", "me/tiny", "--store", store.url, "--revision", COMMIT, "--json"]
        refused = luthier(*command, **env)
    with hub(folder, said="0" * 64) as other:
        differs = luthier(*command, "--convert", **env | {"HF_ENDPOINT": other})
    assert differs.returncode == 2
    assert "pytorch_model.bin is not what the Hub has under that commit" in differs.stderr
    with hub(folder) as address:
        done = luthier(*command, "--convert", **env | {"HF_ENDPOINT": address})
    assert refused.returncode == 2
    assert "add it with --convert" in refused.stderr
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    config = yaml.safe_load(said["config"])
    assert (config["source"], config["revision"]) == ("store", said["revision"])  # the Hub has not these bytes
    assert said["revision"] != COMMIT
    assert models.mirrored(store)[0].source == f"me/tiny@{COMMIT}, converted from pickles"


def test_a_config_is_added_as_it_says(folder: Path, store: FolderStore, tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(f"name: tiny\nsource: {folder}\nlicence: mit\n")
    assert into(store, config, name=None).licence == "mit"
    with pytest.raises(ConfigError, match="correct it there"):
        into(store, config, name="else")
    config.write_text("name: tiny\nsource: store\nlicence: mit\n")
    with pytest.raises(ModelError, match="it is made there"):
        into(store, config, name=None)


def test_the_list_the_inspection_and_the_old_way_to_list(folder: Path, store: FolderStore) -> None:
    added = into(store, folder)

    def ran(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["models", *arguments])

    for arguments in (["list"], []):
        rows = json.loads(ran(*arguments, "--store", store.url, "--json").stdout)
        assert [(row["name"], row["revision"]) for row in rows] == [("tiny", added.revision)]
    seen = ran("inspect", "tiny", "--store", store.url, "--json")
    assert seen.exit_code == 0, seen.output
    assert json.loads(seen.stdout)["definition"]["family"] == "qwen3"
    (folder / "config.json").unlink()
    told = ran("inspect", str(folder))
    assert told.exit_code == 2
    assert "fault: definition" in told.stdout
