"""`luthier serving`: deploy, status, chat, shutdown. Also `python -m serving`.

Commands import what they need when they run, so that --help takes no second.
"""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import LuthierError, exit_code

app = typer.Typer(
    help="Serve a base model and its adapters under OpenAI's API.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Address = Annotated[str | None, typer.Option(help="Ray cluster, host:port. Default: RAY_ADDRESS.")]


@app.command()
def deploy(
    config: Annotated[Path, typer.Argument(help="configs/serving/NAME.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example replicas.max=2")] = None,
    address: Address = None,
    timeout_s: Annotated[float, typer.Option(help="How long to wait for the first answer.")] = 900.0,
) -> None:
    """Put a config on a Ray cluster and wait until it answers; prints the URL. The same name again updates it."""
    from cluster.config import load
    from serving.config import ServingConfig

    loaded = load(config, ServingConfig, overrides or [])
    from serving.permits import Permits

    Permits.here(loaded).check(None)
    from serving import deploy as deployment

    deployment.join(address)
    url = deployment.deploy(loaded, timeout_s, lambda line: print(line, file=sys.stderr, flush=True))
    print(url)


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(help="the application; all if not given")] = None,
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Replicas, the adapters in each, and what they have done."""
    from serving import deploy as deployment

    deployment.join(address)
    found = {each: deployment.status(each) for each in ([name] if name else deployment.applications())}
    if as_json:
        shown = {each: {"state": state, "replicas": list(map(asdict, rows))} for each, (state, rows) in found.items()}
        print(json.dumps(shown))
        return
    if not found:
        print("nothing is served; `luthier serving deploy configs/serving/NAME.yaml`")
    for each, (state, replicas) in found.items():
        print(f"{each}: {state.lower()}, replicas: {len(replicas)}")
        for replica in replicas:
            base = f"base in {replica.quantization}, " if replica.quantization else ""
            print(
                f"  {replica.replica}: {base}running {replica.running}, waiting {replica.waiting}, "
                f"requests {replica.requests}, tokens {replica.generated_tokens}, "
                f"kv blocks {replica.kv_blocks_used}/{replica.kv_blocks_total}, memory: {replica.memory}; "
                f"adapters: {', '.join(replica.adapters) or 'none'}"
            )


@app.command()
def chat(
    question: Annotated[str, typer.Argument(help="what to ask")],
    model: Annotated[str, typer.Option(help="the base's name, or an adapter: name, name@7, name@alias")],
    url: Annotated[str, typer.Option(help="what `deploy` printed")] = "http://127.0.0.1:8000/v1",
    max_tokens: Annotated[int | None, typer.Option(help="length of the answer")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
) -> None:
    """Ask one question and stream the answer; the weights that answer are named on stderr."""
    from cluster.errors import ConfigError, Fault
    from serving.client import Client

    if not math.isfinite(temperature):
        raise ConfigError([Fault("command line", "--temperature", f"got {temperature}; write a number from 0 to 2")])
    if not url.startswith(("http://", "https://")):
        raise ConfigError([Fault("command line", "--url", f"got {url!r}; write what `deploy` printed, http://…/v1")])
    client = Client(url)
    for piece in client.stream(model, question, max_tokens, temperature):
        print(piece, end="", flush=True)
    print()
    print(f"({client.weights})", file=sys.stderr)


@app.command()
def shutdown(
    name: Annotated[str | None, typer.Argument(help="the application; all, and Serve itself, if not given")] = None,
    address: Address = None,
) -> None:
    """Stop serving; streams that run end first."""
    from serving import deploy as deployment

    deployment.join(address)
    stopped = deployment.shutdown(name)
    print(f"stopped: {', '.join(stopped)}" if stopped else "nothing was served")


def main() -> None:
    """Run, with one message and the right exit code for every error that we raise."""
    try:
        app(prog_name="python -m serving")
    except LuthierError as error:
        print(error, file=sys.stderr)
        sys.exit(exit_code(error))
