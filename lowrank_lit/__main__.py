"""``python -m lowrank_lit``: the command line."""

import sys

from lowrank_lit.cli import main

sys.exit(main())
