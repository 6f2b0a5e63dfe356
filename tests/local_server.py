"""The OpenAI-compatible server in a thread of the test, over loopback."""

import argparse
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from radlads.inference import serve
from radlads.inference.options import add_serve_options

STOP_S = 30


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[str]:
    """The address of a server of this model, on the CPU, while open; options: those of `radlads serve`."""
    parser = argparse.ArgumentParser()
    add_serve_options(parser)
    server = serve.build_server(parser.parse_args([str(folder), "--device", "cpu", *options]))
    with serve.listening("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(STOP_S)
        assert not thread.is_alive()
