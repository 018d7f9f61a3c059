"""A real browser without a screen: what it makes of a page, as markup and as pixels. Debian's `chromium`."""

import asyncio
import shutil
import subprocess
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from urllib.parse import urlsplit

import aiohttp
import numpy as np
import numpy.typing as npt
import pytest

DEADLINE_S = 120.0
WIDTH, HEIGHT, SCALE = 700, 3200, 2  # so that a thin line has pixels of its own colour alone

Pixels = npt.NDArray[np.uint8]
"""Rows × columns × (red, green, blue)."""


def dom(page: Path) -> str:
    """The document after everything that runs has run, as markup. Skips the test without the browser."""
    return _browse(page, "--dump-dom")


def picture(page: Path, scheme: Literal["light", "dark"], image: Path) -> Pixels:
    """What somebody sees who prefers this colour scheme; also left in the PNG file `image`."""
    scale = f"--force-device-scale-factor={SCALE}"
    _browse(page, f"--screenshot={image}", scale, f"--blink-settings=preferredColorScheme={int(scheme == 'light')}")
    return _decoded(image.read_bytes())


def _browse(page: Path, *options: str) -> str:
    browser = _browser()
    with TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        # Its own sandbox needs a user other than root; the page is ours.
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={profile}", f"--window-size={WIDTH},{HEIGHT}", *options, page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def run(url: str, script: str) -> Any:
    """Open a page, run JavaScript in it as somebody at its console could, and return what that comes to, as JSON.

    By the Chrome DevTools Protocol. Skips the test without the browser; raises AssertionError for what a script throws.
    """
    with TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        command = [_browser(), *options, f"--user-data-dir={profile}", url]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stderr is not None
                said = next(line for line in process.stderr if line.startswith("DevTools listening on "))
                return asyncio.run(_evaluate(urlsplit(said.split()[-1]).netloc, url, script))
            finally:
                process.kill()


async def _evaluate(host: str, url: str, script: str) -> Any:
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        pages: list[dict[str, str]] = []
        while not pages:
            async with session.get(f"http://{host}/json") as answer:
                pages = [each for each in await answer.json() if each["url"] == url]
        async with session.ws_connect(pages[0]["webSocketDebuggerUrl"]) as page:
            number = 0

            async def evaluate(expression: str) -> Any:
                nonlocal number
                number += 1
                given = {"expression": expression, "awaitPromise": True, "returnByValue": True}
                await page.send_json({"id": number, "method": "Runtime.evaluate", "params": given})
                found = (await page.receive_json())["result"]
                assert "exceptionDetails" not in found, found["exceptionDetails"]
                return found["result"].get("value")

            while not await evaluate(f"location.href === {url!r} && document.readyState === 'complete'"):
                pass
            return await evaluate(script)


def _browser() -> str:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium; Debian's package is `chromium`, and `scripts/test` installs it as root")
    return browser


def _decoded(png: bytes) -> Pixels:
    """A PNG of eight bits a channel, not interlaced (PNG specification, 9: filtering)."""
    place, data = 8, b""
    while place < len(png):
        size, kind = int.from_bytes(png[place : place + 4]), png[place + 4 : place + 8]
        body = png[place + 8 : place + 8 + size]
        if kind == b"IHDR":
            width, height, depth, colour = int.from_bytes(body[:4]), int.from_bytes(body[4:8]), body[8], body[9]
            assert depth == 8
            assert body[12] == 0
            channels = {2: 3, 6: 4}[colour]
        data += body if kind == b"IDAT" else b""
        place += 12 + size
    lines = np.frombuffer(zlib.decompress(data), np.uint8).reshape(height, 1 + width * channels)
    above = np.zeros(width * channels, np.uint8)
    rows = [above := _unfiltered(line[0], line[1:], above, channels) for line in lines]
    return np.stack(rows).reshape(height, width, channels)[:, :, :3]


def _unfiltered(kind: int, line: Pixels, above: Pixels, channels: int) -> Pixels:
    if kind == 0:
        return line.copy()
    if kind == 2:
        return line + above
    if kind == 1:
        sums = np.cumsum(line.reshape(-1, channels).astype(np.uint64), axis=0)
        return (sums & 255).astype(np.uint8).reshape(-1)
    rest, up = line.tobytes(), above.tobytes()
    out = bytearray(up)
    there = np.flatnonzero(line)
    # Without a rest, and beside a pixel that is the one above, Paeth's guess is the one above too.
    first, last = (there[0] // channels * channels, there[-1]) if len(there) else (len(out), len(out))
    for place in range(0 if kind == 3 else first, len(out)):
        left = out[place - channels] if place >= channels else 0
        corner = up[place - channels] if place >= channels else 0
        guess = (left + up[place]) // 2 if kind == 3 else _paeth(left, up[place], corner)
        out[place] = (rest[place] + guess) & 255
        pixel = slice(place - channels + 1, place + 1)
        if kind == 4 and place > last and place % channels == channels - 1 and out[pixel] == up[pixel]:
            break
    return np.frombuffer(bytes(out), np.uint8)


def _paeth(left: int, up: int, corner: int) -> int:
    """Whichever of the three is nearest to left + up - corner; the first of equals."""
    to_left, to_up, to_corner = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
    if to_left <= to_up and to_left <= to_corner:
        return left
    return up if to_up <= to_corner else corner
