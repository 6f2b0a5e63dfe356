#!/usr/bin/env python3
"""Write the weights of a .pth file or model folder as safetensors: one file, or a folder of shards with their index.

A model folder's configuration, tokenizer and code come along. With --published the folder is a checkpoint in the
published format, RWKV6Qwen2ForCausalLM or RWKV7Qwen2ForCausalLM, without code.
"""

import argparse
import functools
import sys
from pathlib import Path

import torch

from radlads.checkpoint.published_export import convert_to_published
from radlads.checkpoint.weight_files import convert_to_safetensors, parse_size
from radlads.cli import INTERRUPTED, USER_ERROR

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, metavar="IN", help="a .pth file, a .safetensors file or a model folder")
    parser.add_argument(
        "target", type=Path, metavar="OUT", help="a name that ends in .safetensors, or else a folder; new in both cases"
    )
    parser.add_argument("--published", action="store_true", help="write the published format; IN is a model folder")
    parser.add_argument("--dtype", choices=DTYPES, help="what the weights are cast to (default: as they are)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="whose tokenizer files OUT gets (default: IN's)")
    parser.add_argument("--shard-size", default="5GB", help="largest shard of a folder, such as 5GB (default) or 500MB")
    parser.add_argument(
        "--retie",
        action="store_true",
        help="drop the head of a tied teacher's student: its embedding is the head again",
    )
    arguments = parser.parse_args()
    if arguments.retie and arguments.published:
        parser.error("--retie and --published exclude each other: published checkpoints have a head of their own")
    convert = (
        convert_to_published
        if arguments.published
        else functools.partial(convert_to_safetensors, retie=arguments.retie)
    )
    try:
        convert(
            arguments.source,
            arguments.target,
            tokenizer_folder=arguments.tokenizer,
            dtype=DTYPES.get(arguments.dtype),
            shard_bytes=parse_size(arguments.shard_size),
        )
    except (ValueError, OSError) as error:
        parser.exit(USER_ERROR, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(INTERRUPTED, f"{parser.prog}: interrupted; nothing was written\n")
    print(f"wrote {arguments.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
