"""All that a model was made from, and one use: the strictest of what their licences say, and whether they go together.

    artefacts ─ each tag checked against what is known of its name ─▸ alternatives (OR) ─▸ judge each ─▸ the mildest

Two things make a whole worse than its parts. Share-alike asks that what is made be under its own terms, which it cannot
be when another part asks for more (`Terms.restrictions`). And names cannot begin with two different words.

A contradiction bars giving the model away. For a use that gives nothing away it is a review, since nothing is broken
yet; no sign-off lifts it once something is given.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import combinations, product
from math import prod

from cluster.errors import InputError
from cluster.licences.facts import Facts, Terms, is_uninformative, is_unknown
from cluster.licences.organisation import Organisation, Use
from cluster.licences.verdict import Duty, Level, Reason, is_given, judge_terms, sign_off_for
from cluster.records import Artefact

_MOST_COMBINATIONS = 4096


@dataclass(frozen=True)
class Judgement:
    """The verdict on a use of what was made from some artefacts.

    Attributes:
        reasons: what makes it more than duties, strictest first.
        duties: each once.
        notes: what a person should know and what decides nothing by itself: tags that are not believed.
        licences: ids of what holds.
    """

    use: Use
    level: Level
    reasons: tuple[Reason, ...]
    duties: tuple[Duty, ...]
    notes: tuple[str, ...]
    licences: tuple[str, ...]

    @property
    def passes(self) -> bool:
        """Whether the use may go on."""
        return self.level <= Level.DUTIES

    def to_dict(self) -> dict[str, object]:
        """For scripts."""
        return {
            "verdict": str(self.level),
            "licences": list(self.licences),
            "reasons": [
                {"level": str(each.level), "text": each.text, "way_out": each.way_out} for each in self.reasons
            ],
            "duties": [
                {"kind": each.kind, "licence": each.licence, "text": each.text, "by": each.by} for each in self.duties
            ],
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class _Part:
    """An artefact under one choice of its alternatives."""

    artefact: Artefact
    terms: frozenset[Terms]
    notes: tuple[str, ...] = ()


def judge(
    artefacts: Sequence[Artefact],
    use: Use,
    facts: Facts,
    organisation: Organisation,
    today: date,
    name: str | None = None,
) -> Judgement:
    """The verdict on a use of a model that was made from `artefacts`.

    Args:
        name: what the model is or will be called; None while it has none.

    Raises:
        InputError: so many alternatives (OR) that they cannot be tried.
    """
    choices = [_parts(artefact, facts) for artefact in artefacts]
    if (ways := prod(map(len, choices))) > _MOST_COMBINATIONS:
        raise InputError(f"the licences leave {ways:,} choices; say which one holds, instead of OR")
    judged = [_judge(parts, use, facts, organisation, today, name) for parts in product(*choices)]
    return min(judged, key=lambda each: (each.level, len(each.reasons), len(each.duties), each.licences))


def _parts(artefact: Artefact, facts: Facts) -> tuple[_Part, ...]:
    """An artefact under each of its alternatives, with what is known of its name beside what its tag says."""
    said = facts.alternatives(artefact.licence)
    known = facts.known_as(artefact.name)
    if known is None:
        return tuple(_Part(artefact, terms) for terms in said)
    if artefact.is_multimodal is None:
        artefact = artefact.model_copy(update={"is_multimodal": known.multimodal})
    holds = facts.alternatives(known.licence)
    if is_uninformative(artefact.licence) or said == holds:
        return tuple(_Part(artefact, terms) for terms in holds)
    said_more = [one for one in said if not _asked(one) <= _asked(holds[0])]
    both = " and both are kept" if said_more else ", which holds"
    note = f"{artefact.name} says {artefact.licence}, but is known to be under {known.licence}{both}"
    if not said_more:
        return tuple(_Part(artefact, terms, (note,)) for terms in holds)
    return tuple(_Part(artefact, one | other, (note,)) for one, other in product(said, holds))


def _asked(terms: Iterable[Terms]) -> frozenset[str]:
    return frozenset().union(*(each.restrictions for each in terms))


def _judge(
    parts: Sequence[_Part], use: Use, facts: Facts, organisation: Organisation, today: date, name: str | None
) -> Judgement:
    reasons: list[Reason] = []
    duties: set[Duty] = set()
    holding: dict[str, Terms] = {}
    for part in parts:
        for terms in part.terms:
            more, owed, holds = _of_part(part, terms, parts, use, organisation)
            reasons += more
            duties |= set(owed)
            if holds:
                holding[terms.id] = terms
    reasons += _contradictions(list(holding.values()), use, facts, organisation)
    reasons += _name(list(holding.values()), use, name)
    open_, signed = _signed(reasons, use, organisation, today)
    duties |= signed
    level = max((reason.level for reason in open_), default=Level.DUTIES if duties else Level.ALLOWED)
    return Judgement(
        use=use,
        level=level,
        reasons=tuple(sorted(open_, key=lambda reason: (-reason.level, reason.text))),
        duties=tuple(sorted(duties)),
        notes=tuple(dict.fromkeys([*(note for part in parts for note in part.notes), *_tags(parts)])),
        licences=tuple(sorted({terms.id for part in parts for terms in part.terms})),
    )


def _of_part(
    part: _Part, terms: Terms, parts: Sequence[_Part], use: Use, organisation: Organisation
) -> tuple[list[Reason], tuple[Duty, ...], bool]:
    """What one licence of one part says, and whether all its terms hold for the whole."""
    artefact = part.artefact
    if artefact.kind == "teacher" and not is_unknown(terms):
        match terms.outputs:
            case "free":
                return [], (), False
            case "same model only":
                bases = [other for other in parts if other.artefact.kind == "base"]
                if not bases or any(terms not in other.terms for other in bases):
                    text = f"outputs of {artefact.name} ({terms.id}) may only improve models made from it"
                    return [Reason(Level.REFUSED, (), text, "leave this data out")], (), False
                return [], (), False
            case "unclear":
                text = f"{terms.id} does not say what its outputs may be used for ({artefact.name})"
                return (
                    [Reason(Level.REVIEW, (terms.id, artefact.name), text, sign_off_for(terms.id, use))],
                    (),
                    False,
                )
            case "named":
                terms = terms.model_copy(
                    update={
                        "attribution": False,
                        "licence_copy": False,
                        "notice": None,
                        "flow_down": False,
                        "share_alike": False,
                        "hosting_is_distribution": False,
                    }
                )
            case "same terms":
                pass
    said = judge_terms(
        terms,
        use,
        organisation,
        artefact.name,
        is_data=artefact.kind == "data",
        is_multimodal=artefact.is_multimodal,
    )
    reasons = list(said.reasons)
    if artefact.kind == "data" and artefact.of:
        # Whoever published the model in between has decided on this; it is not ours to decide again, but to look at.
        return [_softened(reason, use) for reason in reasons], (), False
    return reasons, said.duties, not is_unknown(terms)


def _softened(reason: Reason, use: Use) -> Reason:
    if reason.level < Level.REFUSED:
        return reason
    text = f"{reason.text} (data of a base)"
    return Reason(Level.REVIEW, reason.subjects, text, sign_off_for(reason.subjects[-1], use))


def _contradictions(holding: Sequence[Terms], use: Use, facts: Facts, organisation: Organisation) -> Iterator[Reason]:
    """Licences that cannot all be kept by what is made from all of them."""
    found = [each for each in combinations(holding, 2) if not _go_together(each, facts)]
    if not found and not _go_together(holding, facts):
        found = [tuple(holding)]  # type: ignore[list-item]
    given = any(is_given(terms, use, organisation) for terms in holding)
    for each in found:
        subject = " with ".join(sorted(terms.id for terms in each))
        text = f"{subject} cannot be combined: no licence for what is made would keep all of them"
        if given:
            yield Reason(Level.REFUSED, (), text, "leave one of them out")
        else:
            text += ", so it can never be given away"
            yield Reason(Level.REVIEW, (subject,), text, f"leave one out, or {sign_off_for(subject, use)}")


def _go_together(holding: Sequence[Terms], facts: Facts) -> bool:
    """Whether what is made from all of these can be under some licence, and under some name."""
    prefixes = [terms.name_prefix for terms in holding if terms.name_prefix]
    if any(not begins_with(one, other) and not begins_with(other, one) for one, other in combinations(prefixes, 2)):
        return False
    if any(other.id in terms.incompatible_with for terms in holding for other in holding):
        return False
    alike = [{terms.id, *terms.may_go_under} for terms in holding if terms.share_alike]
    if not alike:
        return True
    # A share-alike licence is content with itself and with those it names; the others must ask for no more than that.
    candidates = [row for row in map(facts.find, sorted(set.intersection(*alike))) if row]
    return any(
        all(terms.share_alike or terms.restrictions <= row.restrictions for terms in holding) for row in candidates
    )


def _name(holding: Sequence[Terms], use: Use, name: str | None) -> Iterator[Reason]:
    """A model that is given away under a name that a licence does not allow."""
    if use != "distribute" or name is None:
        return
    for prefix in sorted({terms.name_prefix for terms in holding if terms.name_prefix}, key=len):
        if not begins_with(name, prefix):
            yield Reason(
                Level.REFUSED,
                (),
                f"the name {name!r} does not begin with {prefix!r}, as the licence wants of what is given away",
                f"call it {with_prefix(name, prefix)!r}",
            )


def begins_with(name: str, prefix: str) -> bool:
    """Whether a name begins with a licence's word, in any case and with any mark in place of a space."""
    return _plain(name).startswith(_plain(prefix))


def with_prefix(name: str, prefix: str) -> str:
    """The name with the licence's word before it, in the name's own case."""
    word = "-".join(prefix.split())
    return f"{word.lower() if name == name.lower() else word}-{name}"


def _plain(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())


def _signed(
    reasons: Sequence[Reason], use: Use, organisation: Organisation, today: date
) -> tuple[list[Reason], set[Duty]]:
    """What is still open, and the sign-offs that cover the rest."""
    open_: list[Reason] = []
    signed: set[Duty] = set()
    for reason in dict.fromkeys(reasons):
        found = [each for each in organisation.signoffs if each.covers(reason.subjects, use, today)]
        if reason.level == Level.REVIEW and found:
            until = f" until {found[0].until}" if found[0].until else ""
            text = f"signed off by {found[0].by} on {found[0].signed_on}{until}: {found[0].why}"
            signed.add(Duty("sign-off", found[0].subject, text, "you"))
        else:
            open_.append(reason)
    return open_, signed


def _tags(parts: Sequence[_Part]) -> Iterator[str]:
    """What is said of one thing twice, and tags that promise more than what the thing was made from allows."""
    by_name = {part.artefact.name: part for part in parts}
    for one, other in combinations(parts, 2):
        is_same = (one.artefact.kind, one.artefact.name) == (other.artefact.kind, other.artefact.name)
        if is_same and one.terms != other.terms and one.artefact.licence and other.artefact.licence:
            said = f"{one.artefact.licence} in one place and {other.artefact.licence} in another"
            yield f"{one.artefact.name} says {said}: both are kept"
    for part in parts:
        made = by_name.get(part.artefact.of or "")
        if made is None or part.artefact.kind == "data" or is_uninformative(made.artefact.licence):
            continue
        if not _asked(part.terms) <= _asked(made.terms) and not any(is_unknown(terms) for terms in part.terms):
            held = " and ".join(sorted(terms.id for terms in part.terms))
            yield (
                f"{made.artefact.name} says {made.artefact.licence}, but is made from {part.artefact.name}: "
                f"{held} holds too"
            )
