"""One stage of a conversion: `python3 train.py -c FILE ... --train.KEY VALUE`, the same as `radlads train`."""

import sys

from radlads.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
