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
    said: ClassVar[str]

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
            siblings = [{"rfilename": name, **self._large(self.folder / name)} for name in named]
            about = {"id": "me/tiny", "sha": COMMIT, "siblings": siblings}
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

    def _large(self, path: Path) -> dict[str, object]:
        """What the Hub says of files that it keeps apart: weights."""
        if path.suffix not in (".safetensors", ".bin"):
            return {}
        data = path.read_bytes()
        digest = self.said or hashlib.sha256(data).hexdigest()
        return {"size": len(data), "lfs": {"sha256": digest, "size": len(data), "pointerSize": 134}}

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # its parent's name
        pass


@contextmanager
def hub(folder: Path, said: str = "") -> Iterator[str]:
    """A Hub with `me/tiny`, whose files are those of `folder`, and `me/gated`; its address.

    Args:
        said: the SHA-256 that it says its weights have, when not the true one.
    """
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"folder": folder, "said": said})) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
