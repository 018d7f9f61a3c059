"""The gate that plan, submit, train, publish, export and serve pass: facts and policy read once, judged from then on.

A gate is a value: it is pickled to where requests are answered, so that a policy which is not on a node decides there
all the same.
"""

import hashlib
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from cluster import made
from cluster.config import Config
from cluster.errors import LicenceRefused
from cluster.licences import notice
from cluster.licences.card import CARD, origin, read_card
from cluster.licences.chain import Judgement, judge
from cluster.licences.evidence import contradictions
from cluster.licences.facts import OWN, Facts, load_facts
from cluster.licences.organisation import Organisation, Use, load_organisation
from cluster.models import ModelConfig
from cluster.records import Artefact, LicenceRecord, distinct


class Gate(Config):
    """The table of licences, and who we are."""

    facts: Facts
    organisation: Organisation

    @classmethod
    def here(cls) -> "Gate":
        """By the files of the current folder, or else of this checkout. Raises ConfigError."""
        return cls(facts=load_facts(), organisation=load_organisation())

    def of_model(self, model: ModelConfig, folder: Path | None = None) -> tuple[Artefact, ...]:
        """A base model and what it was made from: by its config, and by its card where one is at hand.

        Args:
            folder: where the model is, if that is known.
        """
        name = model.source if model.is_hub else model.name
        found = [Artefact(kind="base", name=name, licence=model.licence)]
        for each in model.made_from:
            found += origin(each.name, each.kind, self.facts, name, each.licence)
        where = folder or (Path(model.source).expanduser() if model.is_folder else None)
        if how := made.read(where) if where and not model.is_hub else None:
            found += how.artefacts  # more than its card can say: licences of what is on no Hub
        if card := _card_of(model, folder):
            itself, *rest = self._of_card(card, name, found)
            if itself.licence is not None or rest:
                found += [itself, *rest]
        return self._with_evidence(where or (card.parent if card else None), name, found)

    def of_folder(self, folder: Path) -> tuple[Artefact, ...]:
        """A model's folder by itself: its card, what it says of how it was made, and what lies beside these.

        Raises ModelError for one without a card.
        """
        name = folder.resolve().name
        how = made.read(folder)
        found = list(how.artefacts) if how else []
        return self._with_evidence(folder, name, [*self._of_card(folder, name, found), *found])

    def _of_card(self, card: Path, name: str, stated: Sequence[Artefact]) -> list[Artefact]:
        """What a card says, without what it does not know the licence of and is stated already."""
        itself, *rest = read_card(card, name, self.facts)
        known = {(each.kind, each.name) for each in stated if each.licence is not None}
        return [itself, *(each for each in rest if each.licence is not None or (each.kind, each.name) not in known)]

    def _with_evidence(self, folder: Path | None, name: str, found: Sequence[Artefact]) -> tuple[Artefact, ...]:
        more = contradictions(folder, name, found, self.facts) if folder else []
        return distinct([*found, *(each for _, each in more)])

    def judge(self, artefacts: Sequence[Artefact], use: Use, name: str | None = None) -> Judgement:
        """The verdict on one use, today."""
        return judge(artefacts, use, self.facts, self.organisation, today(), name)

    def judge_all(
        self, artefacts: Sequence[Artefact], name: str | None = None, uses: Iterable[Use] | None = None
    ) -> tuple[Judgement, ...]:
        """The verdict on each use that is meant, as the policy says, or on these."""
        chosen = self.organisation.uses if uses is None else uses
        return tuple(self.judge(artefacts, use, name) for use in chosen)

    def require(
        self, artefacts: Sequence[Artefact], what: str, name: str | None = None, uses: Iterable[Use] | None = None
    ) -> tuple[Judgement, ...]:
        """As `judge_all`. Raises LicenceRefused unless all pass."""
        found = self.judge_all(artefacts, name, uses)
        check(found, what)
        return found

    def notice(self, artefacts: Sequence[Artefact]) -> str:
        """What the NOTICE of what is made says."""
        return notice.compose(artefacts, self.judge(artefacts, "distribute"))

    def record(self, artefacts: Sequence[Artefact], judgements: Sequence[Judgement]) -> LicenceRecord:
        """What a run keeps of how it was judged."""
        return LicenceRecord(
            artefacts=tuple(artefacts),
            organisation=self.organisation.model_dump(mode="json"),
            facts=hashlib.sha256(self.facts.model_dump_json().encode()).hexdigest(),
            on=today().isoformat(),
            verdicts={each.use: str(each.level) for each in judgements},
            duties=tuple(dict.fromkeys(str(duty) for each in judgements for duty in each.duties)),
            notice=self.notice(artefacts),
        )


def check(judgements: Sequence[Judgement], what: str) -> None:
    """Raise LicenceRefused, with every reason and way out, unless all pass."""
    uses: dict[tuple[str, str], list[str]] = {}
    for judgement in judgements:
        for reason in () if judgement.passes else judgement.reasons:
            uses.setdefault((reason.text, reason.way_out), []).append(f"{judgement.use} {reason.level}")
    if uses:
        lines = [f"{text} ({', '.join(found)}); {way_out}" for (text, way_out), found in uses.items()]
        raise LicenceRefused("\n  ".join([f"{what}: licences do not allow this:", *lines]))


def today() -> date:
    """The day by which sign-offs hold."""
    return datetime.now(UTC).date()


def is_own(licence: str | None) -> bool:
    """Whether it is said to be one's own."""
    return licence is not None and licence.strip().lower() == OWN


def _card_of(model: ModelConfig, folder: Path | None) -> Path | None:
    """The card in the model's folder, or of a Hub model in the Hub's cache; no network is asked."""
    if folder is None and model.is_folder:
        folder = Path(model.source).expanduser()
    if folder is not None and (folder / CARD).is_file():
        return folder / CARD
    if model.is_hub:
        found = try_to_load_from_cache(model.source, CARD, revision=model.revision)
        return Path(found) if isinstance(found, str) else None
    return None
