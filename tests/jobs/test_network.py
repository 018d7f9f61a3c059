"""The interface of an address."""

import socket

from jobs.network import interface_of


def test_an_address_is_of_its_interface_and_anothers_of_none() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.1") is None  # for documentation: nobody has it
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        try:
            outward.connect(("203.0.113.1", 9))
        except OSError:  # a machine without a network
            return
        assert interface_of(outward.getsockname()[0]) in {name for _, name in socket.if_nameindex()} - {"lo"}
