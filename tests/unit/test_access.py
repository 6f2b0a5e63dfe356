"""Who may talk to the server: hosts and pages by name, holders of the key."""

import asyncio

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from starlette.applications import Starlette  # noqa: E402
from starlette.responses import PlainTextResponse  # noqa: E402
from starlette.routing import Route  # noqa: E402

from radlads.inference.access import Guard  # noqa: E402


@pytest.fixture(scope="module")
def app():
    return Starlette(
        routes=[Route(path, lambda request: PlainTextResponse("in")) for path in ("/v1/models", "/health")]
    )


def error_of(response):
    return response.json()["error"]


def guarded(app, path="/v1/models", *, host="127.0.0.1:8000", **headers):
    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await client.get(path, headers={"Host": host} | headers)

    return asyncio.run(ask())


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1", "[::1]:8000", "box.lan:8000"])
def test_hosts_by_their_own_names_are_let_through(app, host):
    assert guarded(Guard(app, hosts=["Box.lan"]), host=host).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.com", "evil.com:8000", "127.0.0.1.evil.com", "localhost@evil.com", "", "[::1", "*"]
)
def test_hosts_by_other_names_are_refused(app, host):
    response = guarded(Guard(app), host=host)
    assert response.status_code == 403 and "--allowed-host" in error_of(response)["message"]
    assert guarded(Guard(app, hosts=["*"]), host=host).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.com", "null", "http://localhost.evil.com:8000"])
def test_pages_of_other_hosts_are_refused(app, origin):
    assert guarded(Guard(app), Origin=origin).status_code == 403
    assert guarded(Guard(app), Origin="http://localhost:8000").status_code == 200


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer ", "Bearer wrong", "secret-", "Bearer secret2", "Basic secret"]
)
def test_without_the_key_there_is_no_answer(app, given):
    response = guarded(Guard(app, api_key="secret"), Authorization=given)
    assert response.status_code == 401 and error_of(response)["code"] == "invalid_api_key"


def test_with_the_key_there_is_one_and_health_needs_none(app):
    guard = Guard(app, api_key="secret")
    assert guarded(guard, Authorization="Bearer secret").status_code == 200
    assert guarded(guard, "/health").status_code == 200
    assert guarded(guard, "/health", host="evil.com").status_code == 403
