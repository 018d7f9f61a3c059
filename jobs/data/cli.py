"""`luthier jobs data …`: show. Nothing here imports torch; what reads a tokenizer does when it runs."""

import typer

from jobs.data.show import show

app = typer.Typer(help="What is in data: a sample as the model will see it.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """A group, however many commands it has."""


app.command()(show)
