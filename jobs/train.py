"""Run a recipe on a Ray cluster: `python -m jobs.train configs/recipes/NAME.yaml key=value …`."""

import sys
from pathlib import Path


def main() -> int:
    from cluster import logs
    from cluster.errors import ConfigError, Fault, LuthierError
    from jobs import driver

    try:
        if len(sys.argv) < 2:
            raise ConfigError([Fault("command line", "", "write python -m jobs.train RECIPE.yaml key=value …")])
        line = driver.run(Path(sys.argv[1]), sys.argv[2:])
    except LuthierError as error:
        return logs.fail(error)
    return logs.ended(line)


if __name__ == "__main__":
    sys.exit(main())
