"""`python -m checkpointless_elastic` is the command `checkpointless`."""

import sys

from checkpointless_elastic.command.cli import main

if __name__ == "__main__":
    sys.exit(main())
