"""Strict config: what it refuses, how it says so, and how files compose."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from cluster.config import Config, Reference, load
from cluster.errors import ConfigError


class Engine(Config):
    kind: Literal["v8"]
    litres: float = 4.0


class Motor(Config):
    kind: Literal["electric"]
    kilowatts: int


class Wheels(Config):
    count: int = 4
    sizes: tuple[float, float] = (17.0, 17.0)


class Car(Config):
    name: str
    drive: Annotated[Engine | Motor, Field(discriminator="kind")]
    wheels: Annotated[Wheels, Reference("wheels")] = Wheels()
    doors: int | None = None


def write(folder: Path, text: str, name: str = "cars/car.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def faults(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, Car, overrides)
    return [str(fault) for fault in caught.value.faults]


def test_defaults_then_file_then_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\ndrive: {kind: v8, litres: 2}\ndoors: 3\n")
    assert load(path, Car).drive == Engine(kind="v8", litres=2.0)
    changed = load(path, Car, ["drive.litres=1e-1", "doors=null", "wheels.count=3"])
    assert changed.drive == Engine(kind="v8", litres=0.1)
    assert changed.doors is None
    assert changed.wheels == Wheels(count=3)


def test_an_override_is_split_at_its_first_equals_sign(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\ndrive: {kind: v8}\n")
    assert load(path, Car, ["name='x=y'"]).name == "x=y"


def test_all_faults_are_reported_at_once_each_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "nam: a\ndrive:\n  kind: v8\n  liters: 2\nwheels:\n  count: four\n")
    found = faults(path, "doors=[1]", "oops")
    assert f"{path}:1: nam: unknown key; did you mean 'name'?" in found[1:]
    assert any(line.startswith(f"{path}:4: drive.liters: unknown key; did you mean 'litres'?") for line in found)
    assert any(
        line.startswith(f'{path}:6: wheels.count: got "four"; input should be a valid integer') for line in found
    )
    assert any("command line `doors=[1]`: doors: got [1]" in line for line in found)
    assert any(": name: missing" in line for line in found)
    assert "command line `oops`: write key=value, for example train.steps=100" in found


def test_a_fault_of_the_command_line_does_not_hide_those_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "nam: a\ndrive: {kind: v8}\n")
    assert len(faults(path, "=1")) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", "'name' stands twice"),
        ("name: [a\n", "not valid YAML"),
        ("name: &a [*a]\n", "the alias *a: write out"),
        ("name: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("- a\n", "a mapping of keys to values"),
        ("", "a mapping of keys to values"),
        ("name: a\ndrive: {kind: v8, litres: true}\n", "drive.litres: got true"),
        ("name: a\ndrive: {kind: v9}\n", "drive"),
        ("name: 2024-01-01\ndrive: {kind: v8}\n", "quote dates"),
        ("name: a\ndrive: {kind: v8}\nwheels: big\n", "wheels: no file"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    (fault, *_) = faults(path)
    assert message in fault
    assert str(path) in fault


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    assert "no such file" in faults(tmp_path / "none.yaml")[0]


def test_files_compose_by_reference(tmp_path: Path) -> None:
    write(tmp_path, "count: 3\n", "wheels/three.yaml")
    write(tmp_path, "count: 6\nsizes: [18, 19]\n", "wheels/six.yaml")
    path = write(tmp_path, "name: a\ndrive: {kind: v8}\nwheels: three\n")
    assert load(path, Car).wheels == Wheels(count=3)
    assert load(path, Car, ["wheels=six"]).wheels == Wheels(count=6, sizes=(18.0, 19.0))
    assert load(path, Car, ["wheels=six", "wheels.count=5"]).wheels.count == 5
    assert load(path, Car, ["wheels=../wheels/six.yaml"]).wheels.count == 6
    (fault,) = faults(path, "wheels=tree")
    assert "did you mean 'three'?" in fault


def test_a_word_for_a_section_that_is_no_reference_is_a_fault(tmp_path: Path) -> None:
    """It was once taken for a reference that had been read, and so had no effect."""
    path = write(tmp_path, "name: a\ndrive: {kind: v8}\n")
    (fault,) = faults(path, "drive=electric")
    assert fault.startswith("command line `drive=electric`: drive: ")


def test_an_unknown_section_of_the_command_line_is_placed_there(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\ndrive: {kind: v8}\n")
    (fault,) = faults(path, "wheles.count=3")
    assert fault == "command line `wheles.count=3`: wheles: unknown key; did you mean 'wheels'?"


def test_a_fault_in_a_referenced_file_is_placed_there(tmp_path: Path) -> None:
    wheels = write(tmp_path, "\ncounts: 3\n", "wheels/three.yaml")
    path = write(tmp_path, "name: a\ndrive: {kind: v8}\nwheels: three\n")
    assert faults(path) == [f"{wheels}:2: wheels.counts: unknown key; did you mean 'count'?"]
