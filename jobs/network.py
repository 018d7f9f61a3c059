"""Workers that find one another: each by the address that Ray knows its node by.

Gloo listens on the address that the machine's own name resolves to. Debian and Ubuntu write 127.0.1.1 there, and then
workers on two machines never meet ("Gloo connectFullMesh failed … remote=[127.0.1.1]"). Told the interface, it takes
that one's address. NCCL looks for an interface by itself.
"""

import fcntl
import os
import socket
import struct
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from cluster import env

_SIOCGIFADDR = 0x8915  # Linux: an interface's address


class OwnAddress(TorchConfig):  # type: ignore[misc]  # Ray's classes have no types
    """Ray Train's own setting of a process group, with the interface chosen before."""

    @property
    def backend_cls(self) -> type[Any]:
        return _Backend


class _Backend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(take_interface)
        super().on_start(worker_group, backend_config)


def take_interface() -> None:
    """Have Gloo use the interface of this node's address, unless somebody has named one."""
    name = interface_of(ray.util.get_node_ip_address())
    if name:
        os.environ.setdefault(env.GLOO_SOCKET_IFNAME, name)


def interface_of(address: str) -> str | None:
    """The interface whose first IPv4 address this is; None when there is none such."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(answer[20:24]) == address:  # a sockaddr_in behind 16 bytes of name and 4 of head
                return name
    return None
