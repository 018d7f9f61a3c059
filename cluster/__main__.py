"""`python -m cluster`: the commands of cli.py."""

import sys

from cluster.cli import app, run

if __name__ == "__main__":
    run(app, "python -m cluster", sys.argv[1:])
