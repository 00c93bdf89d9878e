"""Where the server may listen."""

import pytest

from blade.api.server import Address, reserve
from blade.config import ServerOptions
from blade.errors import ConfigError


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_a_public_address_needs_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="--insecure"):
        reserve(ServerOptions(host=host, port=0), has_key=False)


@pytest.mark.parametrize("allowed", [{"insecure": True}, {"key": True}])
def test_with_a_key_or_by_order_it_may_be_public(allowed: dict[str, bool]) -> None:
    options = ServerOptions(host="0.0.0.0", port=0, insecure="insecure" in allowed)
    address: Address = reserve(options, has_key="key" in allowed)
    address.holder.close()
    assert address.url == f"http://0.0.0.0:{address.port}"


@pytest.mark.parametrize(("host", "said"), [("no-such-host.invalid", "--host"), ("192.0.2.1", "--host")])
def test_an_address_that_is_not_ours_is_said(host: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        reserve(ServerOptions(host=host, port=0, insecure=True), has_key=False)
