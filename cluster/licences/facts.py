"""What is known of each licence: the table `configs/policy/licences.yaml`, and how a tag is found in it.

A tag is what a model card or a config says: an SPDX id or expression, a Hub id (`llama3.1`), or a name that stands
beside `other`. It becomes alternatives, each a set of licences that hold together:

    apache-2.0                    {Apache-2.0}
    apache-2.0 OR gpl-3.0         {Apache-2.0} or {GPL-3.0}
    mit AND cc-by-4.0             {MIT, CC-BY-4.0}

The table is of the current folder if it has one, else of this checkout. No network is asked.
"""

import fnmatch
import re
from collections.abc import Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from license_expression import (  # type: ignore[import-untyped]
    ExpressionError,
    ExpressionParseError,
    LicenseWithExceptionSymbol,
    Licensing,
    get_license_index,
    get_spdx_licensing,
)
from pydantic import Field, PositiveInt, model_validator

from cluster.config import Config, load

TABLE = Path("configs") / "policy" / "licences.yaml"
OWN = "own"
"""The licence of one's own data: nobody else's terms."""

Day = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]
Outputs = Literal["free", "named", "same terms", "same model only", "unclear"]
"""What a licence asks of a model that is trained on a model's outputs: nothing; its name and its "Built with …"; all of
the licence; that it be the same model or made from it; or it cannot be told from the text."""

_UNINFORMATIVE = ("", "other", "unknown", "unlicensed", "none", "proprietary")
_MOST_ALTERNATIVES = 64


class Shown(Config):
    """A name to be shown by those who are large enough."""

    text: str
    monthly_users: PositiveInt
    monthly_revenue_usd: PositiveInt


class Terms(Config):
    """One licence, as far as a use can be judged by it. Every row says where and when that was read."""

    id: str = Field(description="its SPDX id where it has one, else its id or name on the Hub")
    name: str
    names: tuple[str, ...] = Field((), description="what else it is called on cards, in any case")
    needs_review: str | None = Field(None, description="why this row decides nothing by itself")
    commercial: bool = True
    hosting: bool = Field(True, description="a service for others may be built on it")
    derivatives: bool = Field(True, description="what is made from it may be given to others")
    attribution: bool = Field(False, description="notices are kept, and changes stated")
    licence_copy: bool = Field(False, description="whoever gets the weights gets the licence's text")
    notice: str | None = Field(None, description="words that a NOTICE has to have")
    built_with: str | None = Field(None, description="words that a service, and what is given away, have to show")
    name_prefix: str | None = Field(None, description="what the name of a model made from it begins with")
    shown: Shown | None = None
    max_monthly_users: PositiveInt | None = None
    max_annual_revenue_usd: PositiveInt | None = None
    use_policy: str | None = Field(None, description="address of the uses that are not allowed")
    forbidden_fields: tuple[str, ...] = Field((), description="fields of use that an organisation can be in")
    excluded_regions: tuple[str, ...] = Field((), description="where nothing is granted: EU, UK, KR …")
    excludes_multimodal_only: bool = False
    share_alike: bool = False
    may_go_under: tuple[str, ...] = Field((), description="other licences that its share-alike is content with")
    incompatible_with: tuple[str, ...] = ()
    flow_down: bool = Field(False, description="its restrictions are put on whoever gets the model, or uses it")
    hosting_is_distribution: bool = False
    outputs: Outputs = "free"
    source: str = Field(pattern=r"^https://")
    read_on: Day

    @property
    def restrictions(self) -> frozenset[str]:
        """What it forbids or asks of all who come after, for comparing with another's share-alike."""
        own = bool(
            self.flow_down
            or self.name_prefix
            or self.built_with
            or self.max_monthly_users
            or self.max_annual_revenue_usd
            or self.forbidden_fields
            or self.use_policy
            or self.excluded_regions
            or self.shown
        )
        found = set() if self.commercial else {"non-commercial"}
        found |= set() if self.derivatives else {"no derivatives"}
        return frozenset(found | ({self.id} if own or self.share_alike else set()))


class Known(Config):
    """Models or data sets whose terms are known by their name, whatever their cards say."""

    names: tuple[str, ...] = Field(min_length=1, description="owner/name on the Hub, with * and ?; the first row holds")
    licence: str
    teachers: tuple[str, ...] = Field((), description="models whose outputs a data set is made of")
    multimodal: bool | None = None
    source: str = Field(pattern=r"^https://")
    read_on: Day


class Facts(Config):
    """What `configs/policy/licences.yaml` holds."""

    licences: tuple[Terms, ...]
    known: tuple[Known, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> "Facts":
        seen: set[str] = set()
        for terms in self.licences:
            for name in {normal(each) for each in (terms.id, *terms.names)}:
                if name in seen:
                    raise ValueError(f"the licence name {name!r} stands in two rows")
                seen.add(name)
        for known in self.known:
            if normal(known.licence) not in seen:
                raise ValueError(f"{known.names[0]} is under {known.licence!r}, which has no row in licences")
        return self

    @cached_property
    def by_name(self) -> dict[str, Terms]:
        """The rows by every name that they have."""
        return {normal(name): terms for terms in self.licences for name in (terms.id, *terms.names)}

    def find(self, tag: str) -> Terms | None:
        """The row of a licence by its id or another of its names."""
        return self.by_name.get(normal(tag))

    def known_as(self, name: str) -> Known | None:
        """What is known of a model or data set by its name on the Hub."""
        return next((row for row in self.known if _matches(name, row.names)), None)

    def alternatives(self, tag: str | None) -> tuple[frozenset[Terms], ...]:
        """The sets of licences of which one has to be kept. What has no row becomes one that decides nothing, or
        `no_row`."""
        if is_uninformative(tag):
            return (frozenset({no_row(tag or "none")}),)
        assert tag is not None
        if row := self.find(tag):
            return (frozenset({row}),)
        try:
            parsed = _licensing().parse(tag)
        except (ExpressionError, ExpressionParseError):
            return (frozenset({no_row(tag)}),)
        found = tuple(frozenset(self._row_of(symbol) for symbol in symbols) for symbols in _disjuncts(parsed))
        return found if len(found) <= _MOST_ALTERNATIVES else (frozenset({no_row(tag)}),)

    def _row_of(self, symbol: Any) -> Terms:
        # An exception only permits more, and none of those is about models: it is left aside.
        key = symbol.license_symbol.key if isinstance(symbol, LicenseWithExceptionSymbol) else symbol.key
        return self.find(key) or unlisted(key)


def no_row(tag: str) -> Terms:
    """The terms of what nobody knows: nothing is granted."""
    return Terms(
        id=tag,
        name=tag,
        commercial=False,
        hosting=False,
        derivatives=False,
        outputs="unclear",
        needs_review="there is no row for it in configs/policy/licences.yaml",
        source="https://spdx.org/licenses/",
        read_on="2026-11-26",
    )


def is_unknown(terms: Terms) -> bool:
    """Whether `no_row` made it."""
    return not (terms.commercial or terms.hosting or terms.derivatives) and terms.needs_review is not None


def unlisted(key: str) -> Terms:
    """A licence without a row. What the index of SPDX and ScanCode calls permissive can be reviewed; the rest not."""
    category = _categories().get(normal(key))
    if category not in ("Permissive", "Public Domain"):
        return no_row(key)
    return Terms(
        id=key,
        name=key,
        attribution=True,
        licence_copy=True,
        needs_review=f"it has no row in configs/policy/licences.yaml; ScanCode calls it {category.lower()}",
        source="https://scancode-licensedb.aboutcode.org/",
        read_on="2026-11-26",
    )


def is_uninformative(tag: str | None) -> bool:
    """Whether a tag says nothing of the terms."""
    return tag is None or normal(tag) in _UNINFORMATIVE


def normal(tag: str) -> str:
    """A licence's name for comparing: lower case, words joined by one hyphen."""
    return re.sub(r"[\s_-]+", "-", tag.strip().lower())


def load_facts() -> Facts:
    """The table. Raises ConfigError."""
    return load(table_path(TABLE), Facts)


def table_path(table: Path) -> Path:
    """The table of the current folder if it has one, else this checkout's."""
    return table if table.exists() else Path(__file__).resolve().parents[2] / table


def _disjuncts(parsed: Any) -> Iterable[tuple[Any, ...]]:
    normal_form = _licensing().dnf(parsed)
    for part in normal_form.args if isinstance(normal_form, _licensing().OR) else (normal_form,):
        yield tuple(part.args) if isinstance(part, _licensing().AND) else (part,)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern.lower()) for pattern in patterns)


@cache
def _licensing() -> Licensing:
    return get_spdx_licensing()


@cache
def _categories() -> dict[str, str]:
    return {
        normal(name): row["category"]
        for row in get_license_index()
        for name in (row["license_key"], row.get("spdx_license_key"), *(row.get("other_spdx_license_keys") or ()))
        if name
    }
