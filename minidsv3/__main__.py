"""``python -m minidsv3 COMMAND``: opens the command line of `minidsv3.commands`."""

import sys

from minidsv3.commands import main

if __name__ == "__main__":
    sys.exit(main())
