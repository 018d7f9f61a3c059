"""Rows from files of every kind and from every place, and every fault of a file with its line."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from cluster.errors import DataError
from cluster.folder import FolderStore
from cluster.s3 import S3Store
from jobs.rows import Row, Unusable, locate, read_rows
from tests.servers import shared


def read(path: Path) -> list[tuple[str, Row | Unusable]]:
    return [(str(place), row) for place, row in read_rows(path, path.name)]


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_rows_of_an_array_stand_where_they_begin(tmp_path: Path) -> None:
    text = '\ufeff\n[\n  {"text":\n "a"},  {"text": "b"}\n,\n\n{"text": "c\\n"}]\n\n'
    assert read(written(tmp_path / "a.json", text)) == [
        ("a.json:3", {"text": "a"}),
        ("a.json:4", {"text": "b"}),
        ("a.json:7", {"text": "c\n"}),
    ]


def test_an_array_may_stand_under_data(tmp_path: Path) -> None:
    assert read(written(tmp_path / "a.json", '{"data":\n[{"text": "a"},\n{"text": "b"}]}\n')) == [
        ("a.json:2", {"text": "a"}),
        ("a.json:3", {"text": "b"}),
    ]


@pytest.mark.parametrize("ending", ["json", "jsonl", "ndjson"])
def test_one_object_a_line_under_any_ending(tmp_path: Path, ending: str) -> None:
    text = '\ufeff{"text": "a"}\r\n\r\n{"text": "b\u2028c"}'
    path = written(tmp_path / f"a.{ending}", text)
    assert read(path) == [(f"a.{ending}:1", {"text": "a"}), (f"a.{ending}:3", {"text": "b\u2028c"})]


def test_a_line_that_is_not_json_is_one_bad_row(tmp_path: Path) -> None:
    deep = "[" * 100_000
    lines = [
        b'{"text": "a"}',
        b'{"text": "b",}',
        b'"c"',
        b'{"text": "\xff"}',
        deep.encode(),
        b"9" * 5000,
        b'{"text": "e"}',
    ]
    rows = read(written(tmp_path / "a.jsonl", b"\n".join(lines)))
    assert rows[0] == ("a.jsonl:1", {"text": "a"})
    assert isinstance(rows[1][1], Unusable)
    assert re.match(r"not JSON at column 1[34]: ", rows[1][1].reason)  # the comma or what follows it, by Python version
    assert rows[2] == ("a.jsonl:3", Unusable("a row is an object, not a string"))
    assert rows[3] == ("a.jsonl:4", Unusable("byte 11 of the line is not UTF-8"))
    assert rows[4] == ("a.jsonl:5", Unusable("not readable JSON: nested too deeply"))
    assert isinstance(rows[5][1], Unusable)
    assert rows[6] == ("a.jsonl:7", {"text": "e"})


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", '[{"text": "a"},\n{"text": }]', r"a\.json:2: not JSON at column 10: .*nothing behind it"),
        (
            "a.json",
            '[{"text": "a"}\n{"text": "b"}]',
            r"a\.json:1: ',' or '\]' is missing after the row that starts here",
        ),
        ("a.json", '[{"text": "a"},\n {"text": "b"}', r"a\.json:2: ',' or '\]' is missing"),
        ("a.json", '[{"text": "a"}]\n[{"text": "b"}]', r"a\.json:2: more text follows the array's end"),
        ("a.json", '{"data": [{"text": "a"}], "more": 1}', r"more text follows the array's end"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.json", '[{"text": "\xff"}]'.encode("latin-1"), r"a\.json: byte 12 is not UTF-8"),
        ("a.json", '{\n "text": "a"\n}', r"a\.json: neither an array of rows nor one JSON object a line"),
        ("a.jsonl", "text\na\n", r"a\.jsonl: neither .* the first fault: a\.jsonl:1: not JSON at column 1"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "the first fault"),
        ("a.json", "[]", r"a\.json: no rows"),
        ("a.jsonl", "\n \n", r"a\.jsonl: no rows"),
        ("a.json", "", r"a\.json: no rows"),
        ("a.csv", "text\na", r"a\.csv: ending '\.csv': data files end in"),
        ("a.parquet", "PAR1", r"a\.parquet: not readable as Parquet after row 0"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(written(tmp_path / name, content))


def test_parquet_rows_without_the_nulls_that_arrow_adds(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "Sky?"}, {"role": "assistant", "tool_calls": [_call({"a": 1})]}]},
        {"messages": [{"role": "user", "content": "Sky?"}, {"role": "assistant", "tool_calls": [_call({"b": "x"})]}]},
    ]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (first, row), (second, other) = read(tmp_path / "a.parquet")
    assert (first, second) == ("a.parquet: row 1", "a.parquet: row 2")
    assert (row, other) == (rows[0], rows[1])


def _call(arguments: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


def test_locate_a_path(tmp_path: Path) -> None:
    path = written(tmp_path / "a b.json", "[]")
    assert locate("a b.json", None, tmp_path, tmp_path) == path
    assert locate(str(path), None, tmp_path, Path("/")) == path
    assert locate(path.as_uri(), None, tmp_path, Path("/")) == path


def test_a_missing_file_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        locate("data/a.json", None, tmp_path, tmp_path)
    said = (
        f"data file data/a.json: looked at {tmp_path}/data/a.json, there is no such file. Paths count from {tmp_path};"
    )
    assert str(caught.value).startswith(said)
    with pytest.raises(DataError, match="that is a folder: name one file in it"):
        locate(".", None, tmp_path, tmp_path)


def test_a_file_in_the_store(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    for text in ("a", "b"):  # replaced in between: the copy of before must not be read again
        store.put("data/a.jsonl", f'{{"text": "{text}"}}'.encode())
        path = locate("store:data/a.jsonl", store, tmp_path / "cache", tmp_path)
        assert path.is_relative_to(tmp_path / "cache")
        assert read(path) == [("a.jsonl:1", {"text": text})]
    with pytest.raises(DataError, match=r"store:a\.json: no object 'a\.json' in file://"):
        locate("store:a.json", store, tmp_path, tmp_path)
    with pytest.raises(DataError, match="names no object"):
        locate("store:", store, tmp_path, tmp_path)
    with pytest.raises(DataError, match="no store is set"):
        locate("store:data/a.jsonl", None, tmp_path, tmp_path)


def test_files_of_one_name_stay_apart(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    for folder in ("a", "b"):
        store.put(f"{folder}/rows.jsonl", folder.encode())
    paths = [locate(f"store:{folder}/rows.jsonl", store, tmp_path / "cache", tmp_path) for folder in ("a", "b")]
    assert [path.read_text() for path in paths] == ["a", "b"]


def test_a_file_in_any_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = shared("ministack")
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    S3Store(server.bucket, "").put("rows/a b.jsonl", b'{"text": "a"}')
    path = locate(f"s3://{server.bucket}/rows/a b.jsonl", None, tmp_path, tmp_path)
    assert read(path) == [("a b.jsonl:1", {"text": "a"})]
    with pytest.raises(DataError, match=rf"no object 'b\.jsonl' in s3://{server.bucket}"):
        locate(f"s3://{server.bucket}/b.jsonl", None, tmp_path, tmp_path)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download needs: one data set with one file."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self.wfile.write(self._answer())

    def _answer(self) -> bytes:
        known = re.fullmatch(r"/datasets/me/skies/resolve/(main|v2)/data/a\.jsonl", self.path)
        body = f'{{"text": "{known[1]}"}}'.encode() if known else b""
        self.send_response(200 if known else 404)
        if known:
            self.send_header("ETag", f'"{known[1]}"')
            self.send_header("X-Repo-Commit", {"main": "0", "v2": "2"}[known[1]] * 40)
        elif "/datasets/me/skies/" in self.path:
            self.send_header("X-Error-Code", "EntryNotFound" if "/main/" in self.path else "RevisionNotFound")
        else:
            self.send_header("X-Error-Code", "GatedRepo" if "gated" in self.path else "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return body

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # its parent's name
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("me/skies/data/a.jsonl", '{"text": "main"}'),
        ("me/skies@v2/data/a.jsonl", '{"text": "v2"}'),
        ("me/skies/b.jsonl", "me/skies has no file b.jsonl"),
        ("me/skies@v3/b.jsonl", "me/skies has no revision v3"),
        ("me/other/b.jsonl", "no data set me/other"),
        ("me/gated/b.jsonl", "me/gated is gated: accept its terms"),
        ("me/sk--ies/b.jsonl", "give the file as store:KEY"),
    ],
)
def test_a_file_on_the_hub(tmp_path: Path, hub: str, source: str, said: str) -> None:
    """In a process of its own, since the hub's library reads its address when it is imported."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom cluster.errors import DataError\nfrom jobs.rows import locate\n"
        "try:\n    print(locate(sys.argv[1], None, Path(), Path()).read_text())\n"
        "except DataError as error:\n    print(error)\n"
    )
    env = {
        **os.environ,
        "HF_ENDPOINT": hub,
        "HF_HOME": str(tmp_path),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-c", code, f"hf://datasets/{source}"]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
    assert said in ran.stdout


@pytest.mark.parametrize("source", ["hf://datasets/name/a.json", "hf://owner/name/a.json", "hf://datasets/owner/name"])
def test_a_hub_address_that_is_none(tmp_path: Path, source: str) -> None:
    with pytest.raises(DataError, match="write hf://datasets/owner/name/file"):
        locate(source, None, tmp_path, tmp_path)
