"""`python -m radlads`: the command line."""

import sys

from radlads.cli import main

sys.exit(main())
