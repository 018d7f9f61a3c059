"""A small client of our own endpoint, for `luthier serving chat`. For programs there is OpenAI's client."""

import json
from collections.abc import Iterator

import httpx

from cluster.errors import LuthierError, RequestError, RunFailed, UnknownModel

_TIMEOUT = httpx.Timeout(10.0, read=600.0)


class Client:
    """Asks one question at a time. `weights` says what answered the last one."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self.weights = ""

    def stream(self, model: str, question: str, max_tokens: int | None, temperature: float) -> Iterator[str]:
        """The answer's text as it comes. Raises UnknownModel, RequestError, RunFailed with the server's message."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "temperature": temperature,
            "max_tokens": max_tokens,
            "stream": True,
        }
        try:
            with httpx.stream(
                "POST", f"{self._url}/chat/completions", json=body, timeout=_TIMEOUT, trust_env=False
            ) as response:
                if response.status_code != 200:
                    response.read()
                    raise _error(response)
                self.weights = response.headers.get("x-luthier-adapter", "")
                yield from _texts(response.iter_lines())
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RunFailed(
                f"{self._url} does not answer: {error}; is it deployed? see `luthier serving status`"
            ) from None


def _texts(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        data = line.removeprefix("data: ")
        if data == "[DONE]" or not line.startswith("data: "):
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            raise RunFailed(chunk["error"]["message"])
        for choice in chunk["choices"]:
            yield choice["delta"].get("content") or ""


def _error(response: httpx.Response) -> LuthierError:
    """The server's refusal as the error that it began as."""
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return RunFailed(f"{response.url} answers {response.status_code}: {response.text[:200]}")
    kinds: dict[int, type[LuthierError]] = {404: UnknownModel, 400: RequestError}
    return kinds.get(response.status_code, RunFailed)(message)
