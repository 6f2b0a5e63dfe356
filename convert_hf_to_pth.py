#!/usr/bin/env python3
"""Write a Hugging Face folder's weights as one .pth file: a plain state dict, as the training commands take it.

Of a stage, an export or a published checkpoint the file is one that the released training code loads strictly.
"""

import argparse
import sys
from pathlib import Path

from radlads.checkpoint.weight_files import convert_to_pth
from radlads.cli import INTERRUPTED, USER_ERROR


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, metavar="IN", help="a folder with safetensors weights, or such a file")
    parser.add_argument("target", type=Path, metavar="OUT", help="the .pth file to write; it must not exist yet")
    arguments = parser.parse_args()
    try:
        convert_to_pth(arguments.source, arguments.target)
    except (ValueError, OSError) as error:
        parser.exit(USER_ERROR, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(INTERRUPTED, f"{parser.prog}: interrupted; nothing was written\n")
    print(f"wrote {arguments.target} ({arguments.target.stat().st_size:,} bytes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
