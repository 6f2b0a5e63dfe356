import sys

from radlads.cli import main

sys.exit(main())
