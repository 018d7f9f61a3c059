"""`python -m jobs`: the commands of cli.py."""

import sys

from cluster.cli import run
from jobs.cli import app

if __name__ == "__main__":
    run(app, "python -m jobs", sys.argv[1:])
