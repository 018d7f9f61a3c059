"""Go on with a run on a Ray cluster: `python -m jobs.resume RUN store=URL [train.workers=N …]`."""

import sys


def main() -> int:
    from cluster import logs
    from cluster.errors import ConfigError, Fault, LuthierError
    from jobs import driver

    try:
        run_id, *overrides = sys.argv[1:] or [""]
        url = next((each.removeprefix("store=") for each in overrides if each.startswith("store=")), "")
        if not run_id or not url:
            raise ConfigError([Fault("command line", "", "write python -m jobs.resume RUN store=URL key=value …")])
        line = driver.resume(run_id, url, [each for each in overrides if not each.startswith("store=")])
    except LuthierError as error:
        return logs.fail(error)
    return logs.ended(line)


if __name__ == "__main__":
    sys.exit(main())
