"""Where ranks look for each other."""

from __future__ import annotations

import pytest

from pretrain_agent.exposition import http_address
from pretrain_agent.network import interface_of, rank_environment


def test_ranks_use_the_network_at_which_their_worker_is_reached() -> None:
    assert rank_environment("127.0.0.1") == {"GLOO_SOCKET_IFNAME": "lo"}


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "a-name", ""])
def test_what_is_no_address_of_this_machine_is_left_to_gloo(host: str) -> None:
    assert interface_of(host) is None
    assert rank_environment(host) == {}


@pytest.mark.parametrize(("host", "address"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("10.1.2.3", None)])
def test_metrics_are_served_everywhere_unless_the_worker_is_this_machines_own_business(
    host: str, address: str | None
) -> None:
    assert http_address(host) == address
