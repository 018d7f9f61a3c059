"""The registry: versions that never change, aliases that only append, and races that lose nothing."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster import keys, registry
from cluster.errors import AdapterNotFound, ConfigError, ObjectExists, StoreUnreachable
from cluster.folder import FolderStore
from cluster.records import AdapterRecord, BaseModelRef

BASE = BaseModelRef(name="tiny", revision="r1", licence="apache-2.0")


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


def adapter(folder: Path, content: str = "weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_text(content)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "NOTICE").write_text("notice")
    return folder


def publish(store: FolderStore, folder: Path, name: str = "support", run: str = "run-1") -> AdapterRecord:
    return registry.publish(store, name, folder, BASE, run, 10, {"loss": 0.5})


def test_versions_count_up_and_never_change(store: FolderStore, tmp_path: Path) -> None:
    first = publish(store, adapter(tmp_path / "a"))
    before = store.get(keys.adapter_record("support", 1))
    second = publish(store, adapter(tmp_path / "b", "other"), run="run-2")
    assert (first.version, second.version) == (1, 2)
    assert first.digest != second.digest
    assert store.get(keys.adapter_record("support", 1)) == before
    assert registry.version_numbers(store, "support") == [1, 2]


def test_publishing_the_same_again_gives_the_same_version(store: FolderStore, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    assert publish(store, folder) == publish(store, folder)
    assert publish(store, folder, run="run-2").version == 2


def test_sixteen_publishers_at_once_get_sixteen_versions(store: FolderStore, tmp_path: Path) -> None:
    folders = [adapter(tmp_path / str(number), str(number)) for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda folder: publish(store, folder, run=folder.name), folders))
    assert sorted(record.version for record in found) == list(range(1, 17))
    for record, folder in zip(found, folders, strict=True):
        key = keys.adapter_file("support", record.version, "adapter_model.safetensors")
        assert store.get(key).decode() == folder.name


class DiesBeforeCommit(FolderStore):
    """A store whose machine goes away just before a record is written."""

    def create(self, key: str, data: bytes) -> None:
        if key.endswith("record.json"):
            raise StoreUnreachable("the plug was pulled")
        super().create(key, data)


def test_a_publisher_that_died_leaves_no_version_and_its_number_is_not_given_again(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    with pytest.raises(StoreUnreachable):
        publish(DiesBeforeCommit(tmp_path / "store"), folder)
    store = FolderStore(tmp_path / "store")
    assert registry.versions(store, "support") == []
    assert registry.names(store) == []
    assert publish(store, folder).version == 2


def test_aliases_move_by_appending(store: FolderStore, tmp_path: Path) -> None:
    for number in range(3):
        publish(store, adapter(tmp_path / str(number), str(number)), run=str(number))
    registry.set_alias(store, "support", "stable", 1, why="first", by="ada")
    registry.set_alias(store, "support", "canary", 3, why="try", by="ada", percent=10)
    registry.set_alias(store, "support", "night", 2, why="", by="ada")
    registry.set_alias(store, "support", "canary", None, why="bad answers", by="bob")
    registry.set_alias(store, "support", "stable", 2, why="rollout", by="ada")
    assert registry.resolve(store, "support").version == 2
    assert registry.resolve(store, "support@stable").version == 2
    assert registry.resolve(store, "support@night").version == 2
    assert registry.resolve(store, "support@1").version == 1
    history = registry.alias_history(store, "support")
    assert [entry.why for entry in history] == ["first", "try", "", "bad answers", "rollout"]
    assert [entry.stable for entry in history] == [1, 1, 1, 1, 2]
    assert history[3].by == "bob"
    with pytest.raises(AdapterNotFound, match=r"no alias canary of adapter support.*its aliases: night, stable"):
        registry.resolve(store, "support@canary")


def test_aliases_set_at_once_are_all_kept(store: FolderStore, tmp_path: Path) -> None:
    publish(store, adapter(tmp_path / "a"))
    names = [f"alias-{number}" for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda name: registry.set_alias(store, "support", name, 1, why=name, by="ada"), names))
    state = registry.alias_state(store, "support")
    assert state
    assert sorted(state.others) == sorted(names)
    assert len(registry.alias_history(store, "support")) == 12


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ("nobody", AdapterNotFound, "no alias stable of adapter nobody.*adapters here: support"),
        ("support@9", AdapterNotFound, "no adapter support@9.*its versions: 1"),
        ("support@nightly", AdapterNotFound, "no alias nightly.*its aliases: stable"),
        ("Support", ConfigError, "name, name@7 or name@alias"),
        ("support@", ConfigError, "name, name@7 or name@alias"),
        ("../x", ConfigError, "name, name@7 or name@alias"),
        ("support@07", ConfigError, "write support@7"),
    ],
)
def test_what_cannot_be_resolved_says_what_there_is(
    store: FolderStore, tmp_path: Path, reference: str, error: type[Exception], message: str
) -> None:
    publish(store, adapter(tmp_path / "a"))
    registry.set_alias(store, "support", "stable", 1, why="")
    with pytest.raises(error, match=message):
        registry.resolve(store, reference)


def test_an_alias_cannot_point_at_nothing_or_be_a_number(store: FolderStore, tmp_path: Path) -> None:
    publish(store, adapter(tmp_path / "a"))
    with pytest.raises(AdapterNotFound, match="its versions: 1"):
        registry.set_alias(store, "support", "stable", 2, why="")
    with pytest.raises(ConfigError, match="not a number"):
        registry.set_alias(store, "support", "7", 1, why="")
    assert registry.alias_history(store, "support") == []


def test_a_record_is_never_overwritten(store: FolderStore, tmp_path: Path) -> None:
    record = publish(store, adapter(tmp_path / "a"))
    with pytest.raises(ObjectExists):
        store.create(keys.adapter_record("support", record.version), b"{}")
