"""One licence and one use: what it says to an organisation. Pure; chain.py puts several together.

    allowed  <  allowed with duties  <  needs review  <  refused

A duty says who fulfils it: a file that goes along, the name, /v1/models, or the organisation itself.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from cluster.licences.facts import Terms, is_unknown
from cluster.licences.organisation import Organisation, Use


class Level(IntEnum):
    """How strict a verdict is."""

    ALLOWED = 0
    DUTIES = 1
    REVIEW = 2
    REFUSED = 3

    def __str__(self) -> str:
        return ("allowed", "allowed with duties", "needs review", "refused")[self]


@dataclass(frozen=True)
class Reason:
    """Why a use is not simply allowed, and the way out.

    Attributes:
        subjects: what a sign-off may name to cover it: the licence, the thing that is under it, or a pair.
    """

    level: Level
    subjects: tuple[str, ...]
    text: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.level}: {self.text}; {self.way_out}"


DutyKind = Literal[
    "notice", "licence copy", "name", "built with", "use policy", "pass on", "share alike", "shown", "sign-off"
]
By = Literal["NOTICE", "LICENSE", "the name", "/v1/models", "you"]


@dataclass(frozen=True, order=True)
class Duty:
    """What a use obliges to. `by` is what fulfils it; `words` are those that have to stand somewhere."""

    kind: DutyKind
    licence: str
    text: str
    by: By
    words: str = ""

    def __str__(self) -> str:
        return f"{self.text} [{self.by}]"


@dataclass(frozen=True)
class Said:
    """What one licence says to one use."""

    reasons: tuple[Reason, ...]
    duties: tuple[Duty, ...]


def judge_terms(
    terms: Terms, use: Use, organisation: Organisation, about: str, *, is_data: bool, is_multimodal: bool | None
) -> Said:
    """What the licence of `about` says to a use.

    Args:
        is_data: it is rows to learn from, which are never given away or served themselves.
        is_multimodal: None where it is not known.
    """
    if is_unknown(terms):
        return Said((_unknown(terms, about),), ())
    reasons = tuple(_reasons(terms, use, organisation, about, is_data, is_multimodal))
    return Said(reasons, tuple(_duties(terms, use, organisation, about, is_data)))


def is_given(terms: Terms, use: Use, organisation: Organisation) -> bool:
    """Whether a use gives the model to others in this licence's eyes: some count a hosted service."""
    is_hosted = use == "serve" and organisation.hosts == "external" and terms.hosting_is_distribution
    return use == "distribute" or is_hosted


def _unknown(terms: Terms, about: str) -> Reason:
    return Reason(
        Level.REFUSED,
        (about,),
        f"{about}: nothing is known of the licence {terms.id!r}",
        "read it and add a row to configs/policy/licences.yaml (licences, or known for this name)",
    )


def _reasons(
    terms: Terms, use: Use, organisation: Organisation, about: str, is_data: bool, is_multimodal: bool | None
) -> Iterator[Reason]:
    subjects = (terms.id, about)
    other = "take another, or agree with its owner and add that licence to configs/policy/licences.yaml"

    def refused(text: str, way_out: str = other) -> Reason:
        return Reason(Level.REFUSED, subjects, f"{about} is under {terms.id}, {text}", way_out)

    def review(text: str, way_out: str) -> Reason:
        return Reason(Level.REVIEW, subjects, f"{about} is under {terms.id}, {text}", way_out)

    if terms.needs_review:
        yield review(f"and {terms.needs_review}", sign_off_for(terms.id, use))
    if organisation.commercial and not terms.commercial:
        yield refused("which does not allow commercial use")
    if (most := terms.max_monthly_users) is not None:
        if organisation.monthly_users is None:
            yield review(f"which ends at {most:,} monthly users", "say monthly_users in the organisation's policy")
        elif organisation.monthly_users > most:
            yield refused(f"which ends at {most:,} monthly users, and we have {organisation.monthly_users:,}")
    if (most := terms.max_annual_revenue_usd) is not None:
        if organisation.annual_revenue_usd is None:
            yield review(f"which ends at ${most:,} a year", "say annual_revenue_usd in the organisation's policy")
        elif organisation.annual_revenue_usd >= most:
            yield refused(f"which ends at ${most:,} a year, and we have ${organisation.annual_revenue_usd:,}")
    if found := sorted(set(terms.forbidden_fields) & set(organisation.fields)):
        yield refused(f"which excludes {', '.join(found)}")
    yield from _regions(terms, organisation, is_multimodal, refused, review)
    if use == "serve" and organisation.hosts == "external" and not terms.hosting and not is_data:
        yield refused("which does not allow a service for others")
    if use == "distribute" and not terms.derivatives:
        if is_data:
            yield review("which allows no derivatives: is a model one?", sign_off_for(terms.id, use))
        else:
            yield refused("which does not allow to give away what is made from it", "keep it, or take another base")


def _regions(
    terms: Terms,
    organisation: Organisation,
    is_multimodal: bool | None,
    refused: Callable[[str], Reason],
    review: Callable[[str, str], Reason],
) -> Iterator[Reason]:
    if not terms.excluded_regions or (terms.excludes_multimodal_only and is_multimodal is False):
        return
    what = "multimodal models" if terms.excludes_multimodal_only else "it"
    where = ", ".join(terms.excluded_regions)
    if not organisation.regions:
        yield review(f"which does not grant {what} in {where}", "say regions in the organisation's policy")
    elif found := sorted(set(terms.excluded_regions) & set(organisation.regions)):
        if terms.excludes_multimodal_only and is_multimodal is None:
            yield review(f"which does not grant {what} in {', '.join(found)}", "say whether this model is one")
        else:
            yield refused(f"which does not grant {what} in {', '.join(found)}")


def _duties(terms: Terms, use: Use, organisation: Organisation, about: str, is_data: bool) -> Iterator[Duty]:
    given = is_given(terms, use, organisation)
    seen = use == "serve" and organisation.hosts == "external"

    def duty(kind: DutyKind, text: str, by: By, words: str = "") -> Duty:
        return Duty(kind, terms.id, text, by, words)

    if terms.use_policy:
        yield duty("use policy", f"keep to {terms.use_policy}", "you")
    if given and (terms.attribution or terms.notice):
        words = terms.notice or f"credit {about}, its licence and that it was changed"
        yield duty("notice", words, "NOTICE", words)
    if given and terms.flow_down:
        yield duty("pass on", f"bind whoever gets or uses it to the restrictions of {terms.id}", "you")
    if use == "distribute" and terms.licence_copy and not is_data:
        yield duty("licence copy", f"the text of {terms.id} goes along", "LICENSE")
    if use == "distribute" and terms.name_prefix:
        yield duty("name", f"the model's name begins with {terms.name_prefix!r}", "the name", terms.name_prefix)
    if seen and terms.name_prefix:
        said = f"the model is shown under a name that begins with {terms.name_prefix!r}"
        yield duty("name", said, "/v1/models", terms.name_prefix)
    if terms.built_with and (seen or use == "distribute"):
        by: By = "/v1/models" if seen else "NOTICE"
        yield duty("built with", f"show {terms.built_with!r}", by, terms.built_with)
    if given and terms.share_alike:
        yield duty("share alike", f"what is made is under {terms.id} too", "NOTICE")
    if terms.shown and seen and _is_large(terms, organisation):
        yield duty("shown", f"show {terms.shown.text!r} in the user interface", "/v1/models", terms.shown.text)


def _is_large(terms: Terms, organisation: Organisation) -> bool:
    """Above either threshold, or not known to be below."""
    assert terms.shown
    users, revenue = organisation.monthly_users, organisation.annual_revenue_usd
    return (
        users is None
        or users > terms.shown.monthly_users
        or revenue is None
        or revenue > 12 * terms.shown.monthly_revenue_usd
    )


def sign_off_for(subject: str, use: Use) -> str:
    """How a person signs off."""
    return f"read it and add a sign-off for {subject!r}, uses [{use}], to configs/policy/organisation.yaml"
