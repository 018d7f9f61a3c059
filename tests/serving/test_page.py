"""The chat page, in a real browser, before a server that says what ours says and more."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from serving import page
from tests.jobs import browser

EVIL = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
MODELS = [
    {"id": "base", "licences": ["llama3.1"], "built_with": ["Built with Llama"], "display_name": "Llama-base"},
    {"id": "support", "licences": ["apache-2.0"], "notices": [f"notice {EVIL}"]},
]
SETTLED = "const until = async what => { while (!what()) await new Promise(done => setTimeout(done, 20)); };"


asked: list[dict[str, Any]] = []


class Server(BaseHTTPRequestHandler):
    """The page itself, and answers to it."""

    def do_GET(self) -> None:
        response = page.response()
        body = response.body if self.path == "/" else json.dumps({"data": MODELS}).encode()
        self.send_response(200)
        for name, value in response.headers.items() if self.path == "/" else {}:
            if name != "content-length":
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        if asked[-1]["messages"][-1]["content"] == "refuse":
            self.send_response(429)
            self.end_headers()
            self.wfile.write(json.dumps({"error": {"message": "too much at once"}}).encode())
            return
        self.send_response(200)
        self.send_header("x-luthier-adapter", "support@3")
        self.end_headers()
        if asked[-1]["messages"][-1]["content"] == "hang":
            self.wfile.write(b'data: {"choices": [{"delta": {"content": "half an answer"}}]}\n\n')
            self.wfile.flush()
            self.rfile.read(1)  # until the page has gone away
            return
        for text in ("It is ", EVIL, " – 好"):
            event = f"data: {json.dumps({'choices': [{'delta': {'content': text}}]}, ensure_ascii=False)}\n\n".encode()
            for part in (event[:-5], event[-5:]):  # events and letters may come in pieces
                self.wfile.write(part)
                self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def url() -> Iterator[str]:
    asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_it_shows_what_licences_want_streams_answers_and_lets_no_text_become_markup(url: str) -> None:
    found = browser.run(
        url,
        SETTLED
        + """(async () => {
            await until(() => $("model").options.length === 2);
            const first = [$("model").selectedOptions[0].textContent, $("terms").innerText];
            $("model").value = "support";
            $("model").dispatchEvent(new Event("change"));
            for (const text of ["Where is it?", "refuse", "And now?"]) {
                $("text").value = text;
                $("form").requestSubmit();
                await until(() => !running);
            }
            const said = [...document.querySelectorAll("article")].map(each => each.innerText);
            return {first, said, terms: $("terms").innerText, title: document.title,
                    images: document.images.length, color: getComputedStyle($("form")).display};
        })()""",
    )
    assert found["first"][0] == "Llama-base"
    assert "Built with Llama" in found["first"][1]
    assert f"notice {EVIL}" in found["terms"]
    assert found["said"][1] == f"It is {EVIL} – 好\nanswered by support@3"
    assert found["said"][3] == "too much at once"
    assert (found["title"], found["images"], found["color"]) == ("Luthier", 0, "flex")
    roles = [[turn["role"] for turn in each["messages"]] for each in asked]
    assert roles == [["user"], ["user", "assistant", "user"], ["user", "assistant", "user"]]
    assert {each["model"] for each in asked} == {"support"}


def test_an_answer_that_is_still_coming_does_not_get_into_the_next_chat(url: str) -> None:
    browser.run(
        url,
        SETTLED
        + """(async () => {
            await until(() => $("model").options.length === 2);
            const say = text => { $("text").value = text; $("form").requestSubmit(); };
            say("hang");
            await until(() => document.body.innerText.includes("half an answer"));
            $("clear").click();
            say("And now?");
            await until(() => !running);
            say("Once more?");
            await until(() => !running);
        })()""",
    )
    said = [[turn["content"] for turn in each["messages"]] for each in asked]
    assert [each[0] for each in said] == ["hang", "And now?", "And now?"]
    assert [len(each) for each in said] == [1, 1, 3]


def test_a_script_that_somebody_got_into_it_does_not_run(url: str) -> None:
    found = browser.run(
        url,
        """(async () => {
            const made = document.createElement("script");
            made.textContent = "document.title = 'broken'";
            document.body.appendChild(made);
            const elsewhere = await fetch("http://127.0.0.1:9/").then(() => "reached", error => error.name);
            return [document.title, elsewhere];
        })()""",
    )
    assert found == ["Luthier", "TypeError"]
