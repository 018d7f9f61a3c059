"""What may answer, by the licences of the base and of each adapter's whole chain; and what /v1/models shows for them.

The gate is made where the config is deployed and travels to the ingresses, so that nodes need no policy of their own.
It judges anew each day, since a sign-off has its last one; another policy holds with the next deployment.
"""

from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any

from cluster.errors import LicenceRefused
from cluster.licences import gate as licences
from cluster.licences.chain import Judgement, begins_with, with_prefix
from cluster.licences.gate import Gate
from cluster.licences.verdict import Duty
from cluster.records import AdapterRecord, Artefact, distinct
from serving.config import ServingConfig

_MOST_REMEMBERED = 4096
_SHOWN = {
    "built with": "built_with",
    "shown": "built_with",
    "notice": "notices",
    "use policy": "terms_of_use",
    "pass on": "terms_of_use",
}
"""Duties that /v1/models fulfils, and under which key."""


@dataclass(frozen=True)
class Permits:
    """A gate, and what the served base was made from."""

    name: str
    gate: Gate
    base: tuple[Artefact, ...]
    _judged: dict[tuple[str, int, date], Judgement] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def here(cls, config: ServingConfig) -> "Permits":
        """By the policy of the current folder, or else of this checkout. Raises ConfigError."""
        gate = Gate.here()
        return cls(config.model.name, gate, gate.of_model(config.model))

    def with_base(self, more: tuple[Artefact, ...]) -> "Permits":
        """With what the store knows of the base."""
        return replace(self, base=distinct([*self.base, *more]), _judged={})

    def check(self, record: AdapterRecord | None) -> None:
        """Raise LicenceRefused unless this adapter, or the base (None), may answer."""
        if self.gate.organisation.hosts == "nobody":
            raise LicenceRefused(
                f"{self.name}: configs/policy/organisation.yaml says that we host nothing (hosts: nobody); correct it"
            )
        licences.check([self._judge(record)], f"{record.name}@{record.version}" if record else self.name)

    def duties(self, record: AdapterRecord | None) -> tuple[Duty, ...]:
        """What answering with it obliges to."""
        return self._judge(record).duties

    def shown(self, id_: str, record: AdapterRecord | None) -> dict[str, Any]:
        """What /v1/models says of the licences behind a model: what is to be shown wherever it is used."""
        judged = self._judge(record)
        shown: dict[str, Any] = {"licences": list(judged.licences)}
        name = id_
        for duty in judged.duties:
            if duty.kind in _SHOWN:
                shown.setdefault(_SHOWN[duty.kind], []).append(duty.words or duty.text)
            if duty.kind == "name" and not begins_with(name, duty.words):
                name = with_prefix(name, duty.words)
        return shown if name == id_ else {**shown, "display_name": name}

    def _judge(self, record: AdapterRecord | None) -> Judgement:
        key = (record.name if record else "", record.version if record else 0, licences.today())
        found = self._judged.get(key)
        if found is None:
            if len(self._judged) >= _MOST_REMEMBERED:
                self._judged.clear()
            artefacts = [*self.base, *(record.chain if record else ())]
            found = self._judged[key] = self.gate.judge(distinct(artefacts), "serve")
        return found
