"""A lineage as a tree for a terminal; every text in it is data, never markup."""

from rich.text import Text
from rich.tree import Tree

from cluster.logs import console
from jobs.lineage import Node

_STYLES = {
    "adapter": "bold green",
    "model": "bold green",
    "run": "bold cyan",
    "base": "bold magenta",
    "data": "bold yellow",
    "prepared": "bold yellow",
    "checkpoint": "bold blue",
}
_DIGESTS = ("digest", "config", "code", "code_digest", "sha256", "facts", "checks", "revision", "rules")
_SHOWN = 12


def show(root: Node) -> None:
    """Print it."""
    console().print(draw(root))


def draw(root: Node) -> Tree:
    """The tree; digests are cut to 12 digits, which `--json` has whole."""
    tree = Tree(_label(root))
    _grow(tree, root)
    return tree


def _grow(tree: Tree, node: Node) -> None:
    for each in node.made_from:
        _grow(tree.add(_label(each)), each)


def _label(node: Node) -> Text:
    name = node.name[:_SHOWN] if node.kind in ("data", "prepared") else node.name
    text = Text.assemble((node.kind, _STYLES.get(node.kind, "bold")), " ", name)
    said = [f"{key.replace('_', ' ')} {_cut(key, value)}" for key, value in node.facts.items() if value is not None]
    if said:
        text.append(f"  {', '.join(said)}", "dim")
    if node.again:
        text.append("  (as above)", "italic")
    if node.broken:
        text.append(f"  broken: {node.broken}", "bold red")
    return text


def _cut(key: str, value: object) -> object:
    if key in _DIGESTS and isinstance(value, str):
        kind, colon, digest = value.rpartition(":")
        return f"{kind}{colon}{digest[:_SHOWN]}"
    return value
