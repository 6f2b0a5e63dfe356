"""The processes that train one model together: starting them, joining them, and never waiting for one that is gone.

Owns launch, process group and the watch over it. Ranks come from Lightning's cluster environments, so torchrun, SLURM
and MPI are known; without one of them the process that was started by hand starts the others of its node. Leaves what
is reduced between processes, and when, to others.
"""

import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import (
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from radlads.config.schema import TrainConfig
from radlads.train.processes.group import ALONE, Processes
from radlads.train.processes.watch import BEAT_S, DEAD_AFTER_S, LEFT_AFTER_S, LOST, Watch, how_it_ended

T = TypeVar("T")
_log = logging.getLogger(__name__)

_STARTED_BY = "RADLADS_STARTED_BY"
_LAUNCHERS = (SLURMEnvironment, TorchElasticEnvironment, MPIEnvironment, LSFEnvironment)


@contextmanager
def joined(train: TrainConfig) -> Iterator[Processes]:
    """Start or join the processes that train.devices and train.num_nodes ask for, and watch over them.

    A user's error that all have is raised as it is in the first and as SystemExit(2) in the others; one that a single
    process has is raised there, saying which, and the others end soon after, as they do if one is killed. Raises
    ValueError if there are fewer devices than asked for.
    """
    accelerator = {"gpu": "cuda"}.get(train.accelerator, train.accelerator)
    on_gpu = accelerator == "cuda" or (accelerator == "auto" and torch.cuda.is_available())
    devices = _num_devices(train.devices, on_gpu)
    if devices * train.num_nodes == 1 and not _launched():
        yield ALONE
        return
    earlier = dict(os.environ)
    children = [] if _launched() else _start_others(devices, train.num_nodes)
    try:
        kind = "cuda" if on_gpu else "cpu"
        for name in ("lightning.fabric", "lightning.pytorch"):
            logging.getLogger(name).setLevel(logging.ERROR)
        fabric = Fabric(accelerator=kind, devices=devices, num_nodes=train.num_nodes, strategy="ddp")
        with _none_missing(children):
            fabric.launch()
            store = _store(fabric.global_rank)
        with _watched(store, fabric.global_rank, fabric.world_size, children):
            yield Processes(fabric.global_rank, fabric.world_size, fabric.device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for child in children:
            _end(child)
        os.environ.clear()
        os.environ.update(earlier)


def _num_devices(asked: int, on_gpu: bool) -> int:
    """How many processes each node has."""
    if not on_gpu:
        if asked == -1:
            raise ValueError("train.devices is -1, all GPUs, but train.accelerator is no GPU: say how many processes")
        return asked
    present = torch.cuda.device_count()
    if asked == 1 or present >= asked > 0:
        return asked  # the trainer says what one process lacks
    if not present:
        raise ValueError(f"train.devices is {asked}, but no CUDA GPU is here: set --train.accelerator cpu")
    if asked > present:
        raise ValueError(f"train.devices is {asked}, but here are {present} GPUs: set --train.devices {present}")
    return present


def _launched() -> bool:
    """Whether a launcher, or the first process of this node, has started this process among others."""
    return "LOCAL_RANK" in os.environ or any(launcher.detect() for launcher in _LAUNCHERS)


def _start_others(devices: int, num_nodes: int) -> list[subprocess.Popen[bytes]]:
    """Start the same command once for every other device of this node, and make this process the node's first.

    The variables are those of Lightning's LightningEnvironment. On several nodes the user sets MASTER_ADDR, MASTER_PORT
    and NODE_RANK.
    """
    if num_nodes > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
            if name not in os.environ:
                raise ValueError(
                    f"train.num_nodes is {num_nodes}, but {name} is not set: start the command by torchrun or srun on "
                    "every node, or set MASTER_ADDR, MASTER_PORT and NODE_RANK"
                )
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    os.environ.setdefault("NODE_RANK", "0")
    os.environ |= {"LOCAL_RANK": "0", "WORLD_SIZE": str(devices * num_nodes)}
    own = {_STARTED_BY: str(os.getpid())}
    return [
        subprocess.Popen(_command(), env=os.environ | own | {"LOCAL_RANK": str(local_rank)})
        for local_rank in range(1, devices)
    ]


def _command() -> list[str]:
    """What this process was started with."""
    spec = sys.modules["__main__"].__spec__
    if spec is not None:
        return [sys.executable, "-m", spec.name, *sys.argv[1:]]
    return [sys.executable, os.path.abspath(sys.argv[0]), *sys.argv[1:]]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _end(child: subprocess.Popen[bytes]) -> None:
    """See to it that a process is gone: it has said or done by now whatever it had to."""
    try:
        child.wait(LEFT_AFTER_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


@contextmanager
def _none_missing(children: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Wait for the others to join, which torch would do for half an hour, no longer than they can.

    Sees to the processes that one command has started on this node; other nodes', and a launcher's, are not known here.
    """
    started_by, joined_all = os.environ.get(_STARTED_BY), threading.Event()

    def missing() -> str | None:
        for child in children:
            if child.poll() is not None:
                return f"process {child.pid} of this run {how_it_ended(child)} before all had joined"
        if started_by is not None and os.getppid() != int(started_by):
            return "the process that started this one is gone"
        return None

    def look() -> None:
        while not joined_all.wait(BEAT_S):
            # An error that all have, this process is about to tell itself
            if (why := missing()) is not None and not joined_all.wait(LEFT_AFTER_S):
                _log.error("radlads: %s: mend what it told above, or start the same command again", why)
                for child in children:
                    child.kill()
                os._exit(LOST)

    watch = threading.Thread(target=look, daemon=True, name="watch over those that join")
    watch.start()
    try:
        yield
    finally:
        joined_all.set()
        watch.join()


@contextmanager
def _watched(store: dist.TCPStore, rank: int, size: int, children: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Watch the other processes, and see to it that an error is told once."""
    watch = Watch(store, rank, size, children)
    watch.start()
    try:
        yield
        dist.barrier()
        watch.leave("")
    except (ValueError, OSError) as error:
        # The first keeps the store, and leaves when all others have: so its word is read before
        of_the_first = None if rank == 0 else watch.wait_for_word_of(0)
        watch.leave(str(error))
        if rank == 0:
            raise
        if of_the_first == str(error):
            raise SystemExit(2) from None
        raise ValueError(f"process {rank} of {size}: {error}") from error
    except RuntimeError as error:
        # How a collective ends when a process has gone depends on the backend; the watch knows which one it was
        lost = watch.wait_for_loss() if _is_of_a_collective(error) else None
        watch.leave(lost or str(error))
        if lost is None:
            raise
        if watch.tells(lost):
            raise OSError(lost) from error
        raise SystemExit(LOST) from error
    except SystemExit:  # all stop, after the same step
        watch.leave("")
        raise
    except BaseException as error:
        watch.leave(repr(error))
        raise
    finally:
        watch.stop()
        if rank == 0:
            watch.wait_for_the_others()


def _is_of_a_collective(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in ("connection", "gloo"))


def _store(rank: int) -> dist.TCPStore:
    """A store of this module's own, which lives in the first process."""
    address = os.environ["MASTER_ADDR"]
    if rank == 0:
        store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
        dist.broadcast_object_list([store.port])
        return store
    port: list[Any] = [None]
    dist.broadcast_object_list(port)
    return dist.TCPStore(address, port[0], is_master=False, timeout=timedelta(seconds=DEAD_AFTER_S))
