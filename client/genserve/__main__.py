"""Entry point of ``python -m genserve``: the command line."""

from genserve.cli import main

if __name__ == "__main__":
    main()
