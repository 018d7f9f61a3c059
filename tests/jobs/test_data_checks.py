"""What is found in rows and done about it, without a cluster: text put right, rules, twins, balance, excerpts."""

import json
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cluster.config import load
from cluster.errors import ConfigError, DataError
from cluster.folder import FolderStore
from jobs.config import DataConfig, DataLicence, Recipe
from jobs.data import augment, balance, prepare, prepared, stage, table, whole
from jobs.data.card import Card, Found, statistics
from jobs.data.cli import app
from jobs.data.examine import CHECKS, Examined, Examiner
from jobs.data.parts import Part, read_parts
from jobs.data.request import Request, Source, Split, Template, make_request
from jobs.data.rules import Balance, Duplicates, Language, Leakage, Personal, Rules, Secrets, Words
from jobs.data.sensitive import excerpt
from jobs.data.tidy import tidy
from jobs.rows import Place, Row
from tests.conftest import TinyModels

ROOT = Path(__file__).parents[2]


def chat(asked: str, answered: str = "Blue.") -> Row:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}


def examine(row: Row | bytes, tmp_path: Path, **rules: object) -> Examined:
    (tmp_path / "rows.jsonl").touch()
    request, _ = make_request([("rows.jsonl", tmp_path / "rows.jsonl")], [], Rules(**rules))  # type: ignore[arg-type]
    return Examiner(request).examine(row)


MENDED = {
    "cafe\u0301": "café",
    "schÃ¶n": "schön",
    "a \u200bb": "a b",
    "one  \r\ntwo\n\n\n\n\n\nthree \n": "one\ntwo\n\n\nthree",
}
LEFT = [
    "你好，世界！（很好）",
    "“quoted”",
    "def f():\n    return 1",
    "👩‍👩‍👧",
    "List<String> x = a < b && c > d;",
    "```html\n<p>kept &amp; shown</p>\n```",
    "می‌خواهم",
]


@pytest.mark.parametrize("text", MENDED)
def test_text_is_put_right(text: str) -> None:
    assert tidy(text, Rules())[0] == MENDED[text]


@pytest.mark.parametrize("text", LEFT)
def test_what_only_looks_wrong_stays(text: str) -> None:
    assert tidy(text, Rules(html="mend")) == (text, ())


def test_tags_go_where_the_rules_say_so_and_the_spaces_of_a_completion_stay() -> None:
    page = "<p>Tom &amp; Jerry<br>ran</p><script>x()</script> home"
    assert tidy(page, Rules(html="warn")) == (page, ("html",))
    assert tidy(page, Rules(html="mend"))[0] == "Tom & Jerry\nran\n home"
    assert tidy(" Blue.", Rules(), "completion")[0] == " Blue."


@given(st.text())
def test_putting_right_twice_is_putting_right_once(text: str) -> None:
    rules = Rules(html="off")
    once = tidy(text, rules)[0]
    assert tidy(once, rules)[0] == once


def test_personal_data_leaves_every_text_of_a_row_and_nothing_of_it_is_told(tmp_path: Path) -> None:
    mail, key = "mira.novak@example.com", "AKIA" + "Q7XLM2VN4KDPTR5W"
    row: Row = {**chat(f"Write to {mail}, then to {mail}.", f"The key is {key}."), "owner": mail}
    masked = examine(row, tmp_path, personal=Personal(do="mask"), secrets=Secrets(do="mask"))
    assert mail not in str(masked.row)
    assert key not in str(masked.row)
    assert "email" in str([(found.check, found.note) for found in masked.findings])
    report = stage.report_of(Part(0, 0, [Place("a.jsonl", 7)], [row], 0), [masked])
    assert report.details == {"personal": {"email": 1}, "secrets": {"secret": 1}}
    assert report.examples["personal"]["mended"][0].place == "a.jsonl:7"
    warned = examine(row, tmp_path, personal=Personal(do="warn"), secrets=Secrets(do="warn"))
    assert warned.row == row
    for text in (report.model_dump_json(), str(stage.report_of(Part(0, 0, [Place("a", 1)], [row], 0), [warned]))):
        assert "mira" not in text
        assert key not in text
    assert examine(row, tmp_path, personal=Personal(do="remove")).row is None
    assert "mira" not in excerpt(f"ask {mail} " * 9)


def test_keys_and_numbers_are_masked_and_a_columns_name_is_refused(tmp_path: Path) -> None:
    card = 4111111111111111
    row: Row = {
        **chat("Sky?"),
        "more": {"keyhole@keyleak.org": card, str(card): True, "order_id": 13800138000, "phone": 13800138000},
        "from": "sender@keyleak.org",
    }
    masked = examine(row, tmp_path, personal=Personal(do="mask")).row
    assert masked
    assert masked["more"] == {"<EMAIL>": "<CARD>", "<CARD>": True, "order_id": 13800138000, "phone": "<PHONE>"}
    assert masked["from"] == "<EMAIL>"
    two = examine({"text": "a", "more": {"a@x.org": 1, "b@x.org": 2}}, tmp_path, personal=Personal(do="mask")).row
    assert two == {"text": "a", "more": {"<EMAIL>": 1, "<EMAIL> 2": 2}}
    named = examine({**row, "errkey9@planted.org": ""}, tmp_path, personal=Personal(do="mask"))
    assert [(each.check, each.outcome, each.detail) for each in named.findings] == [("personal", "refused", "email")]


def test_what_was_before_is_counted_before_anything_is_put_right_or_refused(tmp_path: Path) -> None:
    rows: list[Row | bytes] = [chat("Sky?   \n", "Blue."), {"text": "a@x.org"}, {"other": "12345"}, b"no json"]
    examined = [examine(row, tmp_path, personal=Personal(do="remove")) for row in rows]
    assert [row.characters_before for row in examined] == [len("Sky?   \n\nBlue."), 7, 5, 7]
    assert [row.characters for row in examined] == [len("Sky?\nBlue."), 0, 0, 0]
    rows_read = table_of(examined)
    before = statistics(rows_read, np.ones(4, np.uint16), has_tokens=True, as_read=True)
    assert before.characters
    assert (before.characters.total, before.tokens) == (33, None)


def test_the_places_that_a_refusal_names_and_the_others_are_all_of_them(tmp_path: Path) -> None:
    part = Part(0, 0, [Place("a", number) for number in range(300)], [b"{"] * 300, 0)
    report = stage.report_of(part, examined := [examine(b"{", tmp_path)] * 300)
    found = Found(counts=report.counts["format"], details={}, examples=report.examples["format"])
    counted = statistics(table_of(examined), np.ones(300, np.uint16), has_tokens=False, as_read=True)
    card = Card.model_construct(found={"format": found}, before=counted, after=counted)
    with pytest.raises(DataError) as refused:
        prepare.refuse(card, FolderStore(tmp_path / "store"))
    named = str(refused.value).count("a:")
    assert "300 of 300 rows are refused" in str(refused.value)
    assert f"and {300 - named} more" in str(refused.value)


@pytest.mark.parametrize("do", ["warn", "mask"])
def test_no_reason_that_is_told_quotes_an_address(do: Literal["warn", "mask"], tmp_path: Path) -> None:
    rows: list[Row] = [
        {"messages": [{"role": "usr errleak2@planted.org", "content": "x"}]},
        {"errkey9@planted.org": "x"},
        {**chat("Sky?"), "owner": "o@planted.org", "synthetic": True, "synthetic_by": {"teacher": "me@planted.org"}},
    ]
    rules = {"personal": Personal(do=do), "format": "remove", "balance": Balance(by="owner")}
    examined = [examine(row, tmp_path, **rules) for row in rows]
    assert all(row.findings for row in examined)
    part = Part(0, 0, [Place("a", number) for number in range(3)], list(rows), 0)
    told = stage.report_of(part, examined).model_dump_json() + str([row.group for row in examined])
    assert "planted.org" not in told


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"body": "Contact:\nfoo.bar@barland.com"}, {"body": "Contact:\n<EMAIL>"}),
        ({"log": "a\n4111111111111111", "é": 1.50}, {"log": "a\n<CARD>", "é": 1.50}),
        ({"body": "密码\njoé@x.org \\"}, {"body": "密码\n<EMAIL> \\"}),
        ({"4111111111111111": [4111111111111111, "a@b.org"]}, {"<CARD>": ["<CARD>", "<EMAIL>"]}),
        ({"a@b.org": 1, "c@d.org": 2}, {"<EMAIL>": 1, "<EMAIL> 2": 2}),
        ({"inner": json.dumps({"to": "x\ncy@d.org"})}, {"inner": json.dumps({"to": "x\n<EMAIL>"})}),
        ({"run": 'set "password=Abc12345"'}, {"run": 'set "password=<SECRET>"'}),
    ],
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_arguments_are_json_after_masking(given: object, expected: object, ascii_only: bool, tmp_path: Path) -> None:
    rules = {"personal": Personal(do="mask"), "secrets": Secrets(do="mask")}
    written, wanted = (json.dumps(value, ensure_ascii=ascii_only, indent=1) for value in (given, expected))
    masked = examine({"text": written}, tmp_path, **rules).row
    assert masked == {"text": wanted}


def test_the_same_value_has_the_same_stand_in_in_every_row(tmp_path: Path) -> None:
    rules = {"personal": Personal(do="replace", seed=3)}
    rows = [examine(chat(f"{text} mira.novak@example.com"), tmp_path, **rules).row for text in ("Ask", "Tell")]
    stand_ins = [str(row["messages"][0]["content"]).split()[1] for row in rows if row]  # type: ignore[index]
    assert stand_ins[0] == stand_ins[1]
    assert "@" in stand_ins[0]
    assert "mira.novak" not in stand_ins[0]


def test_language_markers_and_format(tmp_path: Path) -> None:
    german = chat("Wie ist das Wetter heute in der schönen Stadt Hamburg, und wird es morgen regnen?")
    rule = Language(do="remove", allowed=("en",))
    found = examine(german, tmp_path, language=rule)
    assert (found.row, found.findings[0].check, found.findings[0].detail) == (None, "language", "de")
    assert examine(chat("Sky?"), tmp_path, language=rule).row is not None, "too short to tell"
    found = examine(chat("Please zorgle the frob."), tmp_path, toxicity=Words(do="refuse", words=("zorgle",)))
    assert (found.findings[0].outcome, found.findings[0].detail) == ("refused", "zorgle")
    found = examine(b'{"messages": [', tmp_path)
    assert (found.findings[0].check, found.why) == ("format", CHECKS.index("format") + 1)


@pytest.mark.parametrize(("overlong", "outcome"), [("error", "refused"), ("drop", "removed"), ("truncate", "warned")])
def test_rows_are_held_against_template_and_length(
    overlong: Literal["error", "drop", "truncate"],
    outcome: str,
    tiny_models: TinyModels,
    tmp_path: Path,
) -> None:
    data = DataConfig(train=("rows.jsonl",), sequence_length=64, overlong=overlong)
    path = tmp_path / "rows.jsonl"
    path.write_text("{}")
    request, _ = make_request([("rows.jsonl", path)], [], Rules(), Template.of("tiny", tiny_models["qwen3"], data))
    checks = Examiner(request)
    long = checks.examine(chat("Say it.", "blue" + " blue" * 200))
    assert [(found.check, found.outcome) for found in long.findings] == [("template", outcome)]
    assert checks.examine(chat("Sky?")).tokens > 5
    forged = checks.examine(chat("Sky?<|im_end|>"))
    assert (forged.row, forged.findings[0].outcome) == (None, "refused")
    assert "control token" in forged.findings[0].note


def test_equal_conversations_have_equal_digests_whatever_their_format(tmp_path: Path) -> None:
    alpaca: Row = {"instruction": "Sky?", "input": "", "output": "Blue. "}
    digests = {examine(row, tmp_path).digest for row in (chat("Sky?"), chat(" Sky?\n"), alpaca)}
    assert len(digests) == 1
    assert examine(chat("Sky?", "Green."), tmp_path).digest not in digests


def rows_of(digests: Sequence[int], evaluation: int, sources: Sequence[str] = ("held", "train")) -> table.Table:
    """A table of rows with these digests, of which the first so many are of evaluation data."""
    splits: tuple[Split, Split] = ("evaluation", "rows")
    described = [Source(name=name, split=split, size=0, sha256="") for name, split in zip(sources, splits, strict=True)]

    def part(source: int, some: Sequence[int]) -> tuple[stage.PartReport, pa.Table]:
        rows = [Examined(digest=digest.to_bytes(16)) for digest in some]
        columns = {name: [getattr(row, name) for row in rows] for name in stage.SCHEMA.names[1:]}
        report = stage.PartReport(source=source, unit="line", rows=len(rows), counts={}, details={}, examples={})
        return report, pa.table({"number": list(range(1, len(rows) + 1)), **columns}, stage.SCHEMA)

    return table.gather(iter([part(0, digests[:evaluation]), part(1, digests[evaluation:])]), described)


def table_of(rows: list[Examined]) -> table.Table:
    columns = {name: [getattr(row, name) for row in rows] for name in stage.SCHEMA.names[1:]}
    report = stage.PartReport(source=0, unit="line", rows=len(rows), counts={}, details={}, examples={})
    source = Source(name="a", split="rows", size=0, sha256="")
    return table.gather(
        iter([(report, pa.table({"number": list(range(1, len(rows) + 1)), **columns}, stage.SCHEMA))]), [source]
    )


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(0, 30))
def test_of_equal_rows_the_first_stays_and_evaluation_data_is_never_trained_on(digests: list[int], held: int) -> None:
    held = min(held, len(digests))
    rows = rows_of(digests, held)
    twins = list(whole.judge(rows, whole.exact(rows), Rules(), "exact"))
    left = [digest for digest, why in zip(digests, rows.why, strict=True) if why == 0]
    assert left[:held] == digests[:held]
    assert left[held:] == [d for d in dict.fromkeys(digests[held:]) if d not in digests[:held]]
    for twin in twins:
        assert digests[twin.of] == digests[twin.index]
        assert twin.check == ("leakage" if twin.of < held else "duplicates")
        assert rows.place(twin.index) == f"train:{twin.index - held + 1}"


def test_rules_that_warn_take_nothing_out() -> None:
    rows = rows_of([1, 1, 2, 2], 1)
    rules = Rules(duplicates=Duplicates(exact="warn"), leakage=Leakage(exact="off"))
    assert [(twin.check, twin.outcome) for twin in whole.judge(rows, whole.exact(rows), rules, "exact")] == [
        ("duplicates", "warned")
    ]
    assert not rows.why.any()


def test_groups_are_cut_repeated_and_weighed_the_same_way_each_time() -> None:
    counts = {"many": 3000, "few": 1000}
    labels = np.repeat([0, 1], [3000, 1000])
    for do, expected in (("down", (1000, 1000)), ("up", (3000, 3000)), ("weights", (1500, 2500))):
        given_weights = {"many": 0.5, "few": 2.5} if do == "weights" else {}
        rule = Balance(by="kind", do=do, weights=given_weights)  # type: ignore[arg-type]
        found = balance.weights(counts, rule)
        taken = balance.copies(np.array([found["many"], found["few"]])[labels], seed=1)
        sums = np.bincount(labels, taken)
        assert sums == pytest.approx(expected, rel=0.06)
        assert (balance.copies(np.array([found["many"], found["few"]])[labels], seed=1) == taken).all()
    assert (balance.copies(np.full(4000, 0.5), seed=1) != balance.copies(np.full(4000, 0.5), seed=2)).any()
    with pytest.raises(DataError, match="no row has kind 'other'"):
        balance.weights(counts, Balance(by="kind", do="weights", weights={"other": 1.0}))
    with pytest.raises(DataError, match="would be taken 300 times"):
        balance.weights({"a": 300, "b": 1}, Balance(by="kind", do="up"))


def test_parts_are_the_same_each_time_and_never_larger_than_they_may_be(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(b'{"text": "%d"}' % number for number in range(25)) + b"\n\n")
    request, paths = make_request([("rows.jsonl", path)], [], Rules())
    parts = list(read_parts(request.sources, paths, 10))
    assert [len(part.rows) for part in parts] == [10, 10, 5]
    assert str(parts[2].places[-1]) == "rows.jsonl:25"
    assert parts[-1].bytes_before == path.stat().st_size


def digest(path: Path, rules: Rules | None = None, name: str = "a") -> Request:
    return make_request([(name, path)], [], rules or Rules())[0]


def test_another_file_rule_or_evaluation_is_another_request(tmp_path: Path) -> None:
    one, other = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    one.write_text('{"text": "a"}\n')
    other.write_text('{"text": "b"}\n')
    digests = [
        digest(one).digest,
        digest(other).digest,
        digest(one, Rules(html="warn")).digest,
        make_request([("a", one)], [("b", other)], Rules())[0].digest,
    ]
    assert len(set(digests)) == 4
    assert digest(one).digest == digests[0]


def test_the_card_has_each_sources_licence_as_it_is_judged() -> None:
    hub, mine = "hf://datasets/tatsu-lab/alpaca/data.json", "mine.jsonl"
    data = DataConfig(train=(hub, mine, "more.jsonl"), licences={"more": DataLicence(licence="mit", teachers=("a/b",))})
    found = prepared.licences_of(data.train, data)
    assert (found[hub].licence, found[hub].teachers) == ("CC-BY-NC-4.0", ("openai/text-davinci-003",))
    assert (found[mine].licence, found["more.jsonl"].teachers) == ("own", ("a/b",))


def test_a_recipe_names_its_rules_and_overrides_reach_into_them() -> None:
    path = ROOT / "configs" / "recipes" / "quickstart-base.yaml"
    assert load(path, Recipe).data.rules is None
    rules = load(path, Recipe, ["data.rules=data", "data.rules.html=off"]).data.rules
    assert rules
    assert (rules.html, rules.personal.do) == ("off", "mask")
    with pytest.raises(ConfigError, match=r"data\.rules: no file .*did you mean 'data'"):
        load(path, Recipe, ["data.rules=daat"])
    with pytest.raises(ConfigError, match=r"data\.rules\.htm: unknown key; did you mean 'html'"):
        load(path, Recipe, ["data.rules=data", "data.rules.htm=off"])


def test_templates_ask_the_same_in_other_words_and_say_so() -> None:
    rows = [(Place("a", 1), chat("Sky?")), (Place("a", 2), {"instruction": "天空？", "input": "", "output": "蓝。"})]
    made = list(augment.by_templates(rows, 8, seed=1))
    assert made == list(augment.by_templates(rows, 8, seed=1))
    assert len({augment.question(row) for row in made}) == 8
    assert all(row["synthetic"] is True and ("Sky?" in str(row) or "天空？" in str(row)) for row in made)
    assert {str(row["messages"][1]) for row in made if "messages" in row} == {str(chat("")["messages"][1])}  # type: ignore[index]
    with pytest.raises(DataError, match="at most 10 more rows, not 11"):
        list(augment.by_templates(rows, 11, seed=1))


class _Model(BaseHTTPRequestHandler):
    """Answers as a served model that turns a question into capitals, and has nothing to say to "Wind?"."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = asked["messages"][0]["content"].split("---")[1].strip()
        said = "" if text == "Wind?" else text.upper()
        self.send_response(200 if asked["model"] == "caps" else 404)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode())

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        pass


def test_a_served_model_rewrites_questions_and_is_named(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Model) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        path, out = tmp_path / "few.jsonl", tmp_path / "more.jsonl"
        path.write_text("".join(json.dumps(chat(text)) + "\n" for text in ("Sky?", "Wind?", "Sea?")))
        url = f"http://127.0.0.1:{server.server_port}/v1"
        asked = ["augment", str(path), "--rows", "4", "--out", str(out), "--endpoint", url, "--model", "caps"]
        done = CliRunner().invoke(app, asked)
        assert done.exit_code == 0, done.output
        other = CliRunner().invoke(app, [*asked[:-1], "nobody", "--out", str(tmp_path / "none.jsonl")])
        assert "does not answer as nobody" in str(other.exception)
        server.shutdown()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(row["messages"][0]["content"] for row in rows) == ["SEA?", "SEA?", "SKY?", "SKY?"]
    found = examine(rows[0], tmp_path)
    assert (found.synthetic, found.teacher) == (True, "caps")
