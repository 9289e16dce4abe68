"""``python -m planner.cli``: the same as ``rankgate``, for interpreters where the script is not on the PATH."""

import sys

from planner.cli import main

if __name__ == "__main__":
    sys.exit(main())
