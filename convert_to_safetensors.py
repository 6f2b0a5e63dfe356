#!/usr/bin/env python3
"""Write the weights of a .pth file as safetensors: one file, or a folder of shards with their index."""

import argparse
import sys
from pathlib import Path

from radlads.checkpoint.weight_files import convert_to_safetensors, parse_size
from radlads.cli import USER_ERROR


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, metavar="IN", help="a .pth file, a .safetensors file or a model folder")
    parser.add_argument(
        "target", type=Path, metavar="OUT", help="a name that ends in .safetensors, or else a folder; new in both cases"
    )
    parser.add_argument("--shard-size", default="5GB", help="largest shard of a folder, such as 5GB (default) or 500MB")
    arguments = parser.parse_args()
    try:
        shard_bytes = parse_size(arguments.shard_size)
        convert_to_safetensors(arguments.source, arguments.target, shard_bytes=shard_bytes)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return USER_ERROR
    print(f"wrote {arguments.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
