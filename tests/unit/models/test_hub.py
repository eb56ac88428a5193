"""The hub's client is told to use its cache where the hub cannot be looked up, and is told so no longer afterwards."""

import socket

import huggingface_hub.constants as hub
import pytest

from tlscale.models.hub import cache_only_when_unreachable, hub_has_address

PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@pytest.fixture
def lookups(monkeypatch):
    """The hosts that are looked up; `known` of them has an address, and no proxy is set."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    asked = []

    def getaddrinfo(host, port, *args, **kwargs):
        asked.append((host, port))
        if host != "known.example":
            raise socket.gaierror(-3, "Temporary failure in name resolution")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def test_the_host_of_the_endpoint_is_looked_up(lookups, monkeypatch):
    monkeypatch.setattr(hub, "ENDPOINT", "https://known.example/mirror")
    assert hub_has_address()
    monkeypatch.setattr(hub, "ENDPOINT", "http://unknown.example:8080")
    assert not hub_has_address()
    assert lookups == [("known.example", 443), ("unknown.example", 443)]


@pytest.mark.parametrize("name", PROXIES)
def test_a_proxy_looks_up_by_itself(name, lookups, monkeypatch):
    monkeypatch.setattr(hub, "ENDPOINT", "https://unknown.example")
    monkeypatch.setenv(name, "http://proxy.example:3128")
    assert hub_has_address()
    monkeypatch.setenv(name, "")
    assert not hub_has_address()
    assert len(lookups) == 1


@pytest.mark.parametrize(("host", "offline_within"), [("known.example", False), ("unknown.example", True)])
def test_cache_only_where_there_is_no_address(host, offline_within, lookups, monkeypatch):
    monkeypatch.setattr(hub, "ENDPOINT", f"https://{host}")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    with cache_only_when_unreachable():
        assert hub.HF_HUB_OFFLINE is offline_within
    assert hub.HF_HUB_OFFLINE is False


def test_who_is_offline_stays_so_and_looks_nothing_up(lookups, monkeypatch):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    with cache_only_when_unreachable():
        assert hub.HF_HUB_OFFLINE is True
    assert hub.HF_HUB_OFFLINE is True
    assert lookups == []


def test_an_error_within_leaves_nothing_switched(lookups, monkeypatch):
    monkeypatch.setattr(hub, "ENDPOINT", "https://unknown.example")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    with pytest.raises(KeyError), cache_only_when_unreachable():
        raise KeyError
    assert hub.HF_HUB_OFFLINE is False


def test_the_hubs_client_obeys(lookups, monkeypatch, tmp_path):
    """What is not in the cache fails at once, without a request."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    monkeypatch.setattr(hub, "ENDPOINT", "https://unknown.example")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    with pytest.raises(LocalEntryNotFoundError), cache_only_when_unreachable():
        hf_hub_download("timm/test_resnet.r160_in1k", "config.json", cache_dir=tmp_path)
    assert lookups == [("unknown.example", 443)]
