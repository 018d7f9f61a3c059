"""As much of the Hub as bringing a model here needs: two repositories, at one commit, of the files in a folder."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


class _Hub(BaseHTTPRequestHandler):
    folder: ClassVar[Path]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self.wfile.write(self._answer())

    def _answer(self) -> bytes:
        path = unquote(urlsplit(self.path).path)
        named = [each.name for each in sorted(self.folder.iterdir())]
        body, headers, status = b"", {}, 200
        if path in (
            "/api/models/me/tiny",
            "/api/models/me/tiny/revision/main",
            f"/api/models/me/tiny/revision/{COMMIT}",
        ):
            about = {"id": "me/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in named]}
            body = json.dumps(about).encode()
        elif path == f"/api/models/me/tiny/tree/{COMMIT}":
            sizes = [(each.name, each.stat().st_size) for each in sorted(self.folder.iterdir())]
            entries = [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in sizes]
            body = json.dumps(entries).encode()
        elif path.startswith(f"/me/tiny/resolve/{COMMIT}/") and path.rpartition("/")[2] in named:
            body = (self.folder / path.rpartition("/")[2]).read_bytes()
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        else:
            status = 403 if "gated" in path else 404
            headers = {"X-Error-Code": "GatedRepo" if "gated" in path else "RepoNotFound"}
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        return body

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # its parent's name
        pass


@contextmanager
def hub(folder: Path) -> Iterator[str]:
    """A Hub with `me/tiny`, whose files are those of `folder`, and `me/gated`; its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"folder": folder})) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
