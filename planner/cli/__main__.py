"""``python -m planner.cli``: the same as ``rankgate``, for interpreters where the script is not on the PATH."""

import sys

from planner.cli import main

__all__: list[str] = []


if __name__ == "__main__":
    sys.exit(main())
