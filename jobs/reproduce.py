"""Do a run once more and compare its losses: `python -m jobs.reproduce NAME@3|RUN store=URL [train.workers=N …]`."""

import sys


def main() -> int:
    from cluster import logs
    from cluster.errors import ConfigError, Fault, LuthierError
    from jobs import reproduction

    try:
        reference, *overrides = sys.argv[1:] or [""]
        url = next((each.removeprefix("store=") for each in overrides if each.startswith("store=")), "")
        if not reference or not url:
            usage = "write python -m jobs.reproduce NAME@3|RUN store=URL key=value …"
            raise ConfigError([Fault("command line", "", usage)])
        line = reproduction.run(reference, url, [each for each in overrides if not each.startswith("store=")])
    except LuthierError as error:
        return logs.fail(error)
    return reproduction.ended(line)


if __name__ == "__main__":
    sys.exit(main())
