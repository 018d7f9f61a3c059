"""Evaluate a version on a Ray cluster: `python -m jobs.evaluate NAME@V|RUN store=URL [recipe=FILE] [key=value …]`."""

import sys


def main() -> int:
    from cluster import logs
    from cluster.errors import ConfigError, Fault, LuthierError
    from jobs import release

    try:
        reference, *given = sys.argv[1:] or [""]
        named = dict(each.split("=", 1) for each in given if each.startswith(("store=", "recipe=")))
        if not reference or "store" not in named:
            raise ConfigError([Fault("command line", "", "write python -m jobs.evaluate NAME@V|RUN store=URL …")])
        overrides = [each for each in given if not each.startswith(("store=", "recipe="))]
        report = release.evaluate(reference, named["store"], named.get("recipe"), overrides)
    except LuthierError as error:
        return logs.fail(error)
    return release.reported(report)


if __name__ == "__main__":
    sys.exit(main())
