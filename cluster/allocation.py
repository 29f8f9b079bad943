"""What a node lets a process use: the share of its container or pod, not of the whole machine.

`allocation` is called on the node itself: by every rank before a group starts, and by whatever else looks at nodes.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field

import torch

from cluster.cpus import cpu_limit
from cluster.network import administrators, interface_of
from cluster.text import count
from simmatch.memory import machine_bytes


@dataclass(frozen=True)
class Allocation:
    """What the process that called `allocation` may use of its node.

    Attributes
    ----------
    host: name of the node, as it calls itself.
    address: IPv4 address of the network interface that the exchanges use.
    cpus: whole CPUs: the cores of its affinity, or what its control groups allow of them; at least 1.
    cores: of the whole machine.
    limited_by: what `cpus` comes from: `control group`, `affinity`, or nothing ("") but the machine.
    memory_bytes: of the machine, or what its control groups allow of it.
    gpus: identifiers of the GPUs that it sees, as in CUDA_VISIBLE_DEVICES.
    interface: name of the network interface; empty where there is none, see `interface_error`.
    chosen: library (`gloo`, `nccl`) → the interface that an administrator has chosen for it, see
        `cluster.network.administrators`.
    interface_error: why there is no such interface; empty where there is.
    """

    host: str
    address: str
    cpus: int
    cores: int = 0
    limited_by: str = ""
    memory_bytes: int = 0
    gpus: tuple[str, ...] = ()
    interface: str = ""
    chosen: dict[str, str] = field(default_factory=dict, hash=False)
    interface_error: str = ""

    def __str__(self) -> str:
        return f"{self.host} ({self.address})"

    @property
    def of_cpus(self) -> str:
        """The CPUs in a sentence.

        >>> Allocation("node-a", "10.0.0.7", 4, cores=64, limited_by="control group").of_cpus
        '4 CPUs (of 64, by its control group)'
        """
        return count(self.cpus, "CPU") + (f" (of {self.cores}, by its {self.limited_by})" if self.limited_by else "")


def allocation(interface: str | None, address: str) -> Allocation:
    """What this process may use of the node it runs on. It neither fails nor touches a GPU.

    Parameters
    ----------
    interface: `cluster.interface`; None: the interface that has the node's address.
    address: of the node, as Ray knows it.

    >>> here = allocation(None, "127.0.0.1")
    >>> here.host == socket.gethostname(), 1 <= here.cpus <= here.cores
    (True, True)
    """
    name, problem = "", ""
    try:
        name, address = interface_of(interface, address)
    except ValueError as error:
        problem = str(error)
    cpus, limited_by = cpu_limit()
    return Allocation(
        host=socket.gethostname(),
        address=address,
        cpus=cpus,
        cores=os.cpu_count() or 1,
        limited_by=limited_by,
        memory_bytes=machine_bytes(),
        gpus=visible_gpus(),
        interface=name,
        chosen=administrators(),
        interface_error=problem,
    )


def visible_gpus() -> tuple[str, ...]:
    """Identifiers of the GPUs that this process sees; counting them makes no context on any.

    >>> len(visible_gpus()) == torch.cuda.device_count()
    True
    """
    found = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return tuple(named[:found]) or tuple(map(str, range(found)))
