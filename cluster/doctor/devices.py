"""What nvidia-smi says of a node's GPUs, as far as it matters here. Pure; formats of drivers 470 to 580."""

import xml.etree.ElementTree as ET
from dataclasses import dataclass

COMMAND = ("nvidia-smi", "-q", "-x")
"""XML, because what a driver does not know is then left out; one unknown field makes `--query-gpu` fail as a whole."""

_SLOWDOWNS = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")
_MIB = 1 << 20


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        memory: in bytes.
        uncorrected: errors of its memory since the driver was loaded.
        is_remapping: rows of its memory wait for a reset to be replaced.
        slowed_by: why its clock is held down now, of what has to do with heat and power supply.
        is_partitioned: whether MIG is on.
        fabric: how far it has joined the node's NVSwitches; empty where there are none.
    """

    name: str
    memory: int = 0
    uncorrected: int = 0
    is_remapping: bool = False
    remapping_failed: bool = False
    slowed_by: tuple[str, ...] = ()
    is_persistent: bool = True
    is_partitioned: bool = False
    needs_reset: bool = False
    fabric: str = ""


@dataclass(frozen=True)
class Gpus:
    """All of a node. `cuda` is the newest CUDA that the driver takes; `error` is what nvidia-smi said instead."""

    driver: str = ""
    cuda: str = ""
    gpus: tuple[Gpu, ...] = ()
    error: str = ""


def parse(printed: str) -> Gpus:
    """From what `COMMAND` printed; what is no XML is its error."""
    start = printed.find("<nvidia_smi_log>")
    try:
        root = ET.fromstring(printed[start:] if start >= 0 else "")  # noqa: S314 - the node's own driver wrote it
    except ET.ParseError:
        lines = printed.strip().splitlines()
        return Gpus(error=lines[0] if lines else "it printed nothing")
    return Gpus(
        driver=_text(root, "driver_version"),
        cuda=_text(root, "cuda_version"),
        gpus=tuple(_gpu(each) for each in root.findall("gpu")),
    )


def _gpu(found: ET.Element) -> Gpu:
    reasons = found.find("clocks_event_reasons")
    if reasons is None:
        reasons = found.find("clocks_throttle_reasons")  # as it was called before driver 535
    active = {
        each.tag.partition("_reason_")[2] for each in (() if reasons is None else reasons) if each.text == "Active"
    }
    return Gpu(
        name=_text(found, "product_name"),
        memory=_number(found, "fb_memory_usage/total") * _MIB,
        uncorrected=sum(_whole(each.text) for each in found.findall("ecc_errors/volatile/*") if _is_uncorrected(each)),
        is_remapping=_text(found, "remapped_rows/remapped_row_pending") == "Yes",
        remapping_failed=_text(found, "remapped_rows/remapped_row_failure") == "Yes",
        slowed_by=tuple(name for name in _SLOWDOWNS if name in active),
        is_persistent=_text(found, "persistence_mode") != "Disabled",
        is_partitioned=_text(found, "mig_mode/current_mig") == "Enabled",
        needs_reset=_text(found, "gpu_reset_status/reset_required") == "Yes",
        fabric=_fabric(found),
    )


def _fabric(found: ET.Element) -> str:
    said = [_text(found, f"fabric/{what}") for what in ("state", "status")]
    return " ".join(word for word in said if word not in ("", "N/A"))


def _is_uncorrected(counter: ET.Element) -> bool:
    """`dram_uncorrectable`, `sram_uncorrectable`, and their parities; not totals that hold them once more."""
    return "uncorrectable" in counter.tag and "threshold" not in counter.tag


def _text(found: ET.Element, path: str) -> str:
    return (found.findtext(path) or "").strip()


def _number(found: ET.Element, path: str) -> int:
    """The number before its unit; 0 for N/A."""
    return _whole(_text(found, path))


def _whole(text: str | None) -> int:
    word = (text or "").split()[:1]
    return int(word[0]) if word and word[0].isdecimal() else 0
