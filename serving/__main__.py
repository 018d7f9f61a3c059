"""`python -m serving`: the commands of cli.py."""

from serving.cli import main

if __name__ == "__main__":
    main()
