"""/metrics: every `luthier_*` family of the whole cluster as one Prometheus text.

Ray's agent on each node exports what the processes there recorded, under the prefix `ray_` and among 150 families of
Ray's own. One scrape of ours asks every live node, keeps our families and gives them their own names back.
"""

import asyncio
import re
from collections.abc import Iterable

import httpx
import ray

from cluster import metrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TIMEOUT_S = 5.0
_NOISE = re.compile(r'otel_scope_\w+="[^"]*",?')  # labels of the exporter about itself
_OURS = re.compile(rf"^(# (?:HELP|TYPE) )?ray_({metrics.PREFIX}\w+)")


async def scrape() -> str:
    """The text of all live nodes. A node that does not answer is named in a comment, so that a gap can be seen."""
    nodes = [node for node in await asyncio.to_thread(ray.nodes) if node["Alive"]]
    places = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes]
    async with httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False) as client:
        texts = await asyncio.gather(*(_read(client, place) for place in places))
    missing = [f"# node {place} does not answer\n" for place, text in zip(places, texts, strict=True) if text is None]
    return "".join([merge(text for text in texts if text is not None), *missing])


async def _read(client: httpx.AsyncClient, place: str) -> str | None:
    try:
        answer = await client.get(f"http://{place}/metrics")
        return answer.raise_for_status().text
    except httpx.HTTPError:
        return None


def merge(texts: Iterable[str]) -> str:
    """Our families of several exports as one: a family's HELP and TYPE once, its samples together."""
    families: dict[str, list[str]] = {}
    family = ""
    for line in (line for text in texts for line in text.splitlines()):
        found = _OURS.match(line)
        if not found:
            continue
        comment, name = found.groups()
        if comment or not name.startswith(family) or not family:
            family = name
        lines = families.setdefault(family, [])
        ours = line.replace(f"ray_{metrics.PREFIX}", metrics.PREFIX, 1)
        if not comment:
            ours = _NOISE.sub("", ours).replace(",}", "}", 1)
        if not comment or ours not in lines:
            lines.append(ours)
    return "".join(f"{line}\n" for lines in families.values() for line in lines)
