"""`luthier cluster files|up|down|status|dashboard`: clusters from configs/clusters/NAME.yaml.

Commands import what they need when they run, so that --help takes no second.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cluster.place import ClusterConfig

app = typer.Typer()

Name = Annotated[str, typer.Argument(help="configs/clusters/NAME.yaml, or a path ending in .yaml")]
Yes = Annotated[bool, typer.Option("--yes", help="do not ask before machines are started or ended")]


@app.command()
def files(
    name: Name,
    out: Annotated[Path | None, typer.Option(help="where to. Default: .luthier/clusters/NAME")] = None,
    recipe: Annotated[str | None, typer.Option(help="Kubernetes: also a RayJob that trains this recipe")] = None,
    serving: Annotated[str | None, typer.Option(help="Kubernetes: also a RayService of this serving config")] = None,
    store: Annotated[str | None, typer.Option(help="the store that the two use")] = None,
) -> None:
    """Write the files that a cluster is made from, to read or to apply yourself."""
    for path in _write(named(name), out, recipe, serving, store):
        print(path)


@app.command()
def up(
    name: Name,
    yes: Yes = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only write the files")] = False,
) -> None:
    """Start a cluster, or change it to what its file says now."""
    from cluster.launch import commands

    cluster = named(name)
    written = _write(cluster)
    if dry_run:
        print(*written, sep="\n")
    else:
        commands.up(cluster, written[0].parent, yes)


@app.command()
def down(name: Name, yes: Yes = False) -> None:
    """End a cluster."""
    from cluster.launch import commands

    cluster = named(name)
    commands.down(cluster, _write(cluster)[0].parent, yes)


@app.command()
def status(name: Name) -> None:
    """Nodes of a cluster, what they offer, and what is asked for."""
    from cluster.launch import commands

    cluster = named(name)
    commands.status(cluster, _write(cluster)[0].parent)


@app.command()
def dashboard(name: Name, port: Annotated[int, typer.Option(help="on this machine's loopback")] = 8265) -> None:
    """Hold a tunnel to a cluster's dashboard, for a browser and for `luthier jobs submit`."""
    from cluster.launch import commands

    cluster = named(name)
    commands.dashboard(cluster, _write(cluster)[0].parent, port)


def named(name: str) -> "ClusterConfig":
    from cluster.config import load
    from cluster.place import ClusterConfig

    path = Path(name) if name.endswith(".yaml") else Path("configs/clusters") / f"{name}.yaml"
    return load(path, ClusterConfig)


def _write(
    cluster: "ClusterConfig",
    out: Path | None = None,
    recipe: str | None = None,
    serving: str | None = None,
    store: str | None = None,
) -> list[Path]:
    from cluster.launch.files import make_files, write_files
    from cluster.launch.release import Release

    folder = out or Path(".luthier/clusters") / cluster.name
    return write_files(make_files(cluster, Release.read(), str(folder), recipe, serving, store), folder)
