"""The ways in which a store may be set up, each with what a client needs to know: a URL for every role."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

import trustme
from redis.asyncio import Redis

from barrier.store.acl import acl_file, admin_user, all_users, hashed
from barrier.store.keys import Keys
from planner.embedded import LOOPBACK
from tests.integration.servers import Kind, RealCluster, RealSentinels, RealServer

PASSWORD = "s3cret/with@odd:characters"


@dataclass
class Setup:
    """A store.

    `of_role` gives the URL for ``planner``, ``observer`` or ``rank-<r>``. `administrators` are clients that may do anything, one for
    each server.
    """

    name: str
    of_role: Callable[[str], str]
    administrators: list[Any] = field(default_factory=list[Any])

    def url(self, role: str) -> str:
        return self.of_role(role)

    async def forget_scripts(self) -> None:
        for client in self.administrators:
            await client.script_flush()

    async def flush(self) -> None:
        for client in self.administrators:
            await client.flushall()

    async def break_connections(self) -> None:
        """Every client's but the administrators' own."""
        for client in self.administrators:
            await client.client_kill_filter(_type="normal", skipme=True)

    async def refusals(self) -> list[dict[str, Any]]:
        """What the servers' ACL logs say."""
        return [entry for client in self.administrators for entry in await client.acl_log()]


Maker: TypeAlias = Callable[[Kind, Path], Any]


@asynccontextmanager
async def administered(*urls: str, **arguments: Any) -> AsyncGenerator[list[Any]]:
    untyped: Any = Redis
    clients = [untyped.from_url(url, protocol=2, **arguments) for url in urls]
    try:
        yield clients
    finally:
        for client in clients:
            await client.aclose()


@asynccontextmanager
async def one_server(kind: Kind, _: Path) -> AsyncGenerator[Setup]:
    async with RealServer(kind=kind) as server, administered(server.url) as clients:
        yield Setup("one server", lambda _: server.url, clients)


@asynccontextmanager
async def password(kind: Kind, folder: Path) -> AsyncGenerator[Setup]:
    """The password comes from a file that the URL names."""
    secret = folder / "password"
    secret.write_text(f"{PASSWORD}\n")
    async with RealServer(kind=kind, transport="tcp", password=PASSWORD) as server, administered(server.url) as clients:
        url = f"redis://{LOOPBACK}:{server.port}/0?password_file={quote(str(secret))}"
        yield Setup("password", lambda _: url, clients)


@asynccontextmanager
async def sentinel(kind: Kind, _: Path) -> AsyncGenerator[Setup]:
    async with RealSentinels(kind=kind, password=PASSWORD) as group:
        hosts = ",".join(f"{host}:{port}" for host, port in group.sentinel_addresses)
        url = f"redis+sentinel://:{quote(PASSWORD, safe='')}@{hosts}/{group.master_name}/0"
        async with administered(group.servers[0].url) as clients:
            yield Setup("sentinel", lambda _: url, clients)


@asynccontextmanager
async def cluster(kind: Kind, _: Path) -> AsyncGenerator[Setup]:
    async with RealCluster(kind=kind) as nodes, administered(*(server.url for server in nodes.servers)) as clients:
        yield Setup("cluster", lambda _: nodes.url, clients)


@asynccontextmanager
async def tls(kind: Kind, folder: Path) -> AsyncGenerator[Setup]:
    """Both sides show a certificate of one authority. The server has no other port."""
    certificates = Certificates(folder)
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        port = free.getsockname()[1]
    config = [f"tls-port {port}", *certificates.server_config]
    async with RealServer(kind=kind, password=PASSWORD, config=config) as server, administered(server.url) as clients:
        url = f"rediss://:{quote(PASSWORD, safe='')}@localhost:{port}/0?{certificates.client_query}"
        yield Setup("TLS", lambda _: url, clients)


class Certificates:
    """An authority of the test's own, and a certificate for this machine, in files."""

    def __init__(self, folder: Path) -> None:
        authority, self.folder = trustme.CA(), folder
        issued = authority.issue_cert("localhost", LOOPBACK)
        authority.cert_pem.write_to_path(str(folder / "ca.pem"))
        issued.private_key_pem.write_to_path(str(folder / "key.pem"))
        issued.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))

    @property
    def server_config(self) -> list[str]:
        return [
            f"tls-ca-cert-file {self.folder}/ca.pem",
            f"tls-cert-file {self.folder}/cert.pem",
            f"tls-key-file {self.folder}/key.pem",
            "tls-auth-clients yes",
        ]

    @property
    def client_query(self) -> str:
        return (
            f"ssl_ca_certs={self.folder}/ca.pem&ssl_certfile={self.folder}/cert.pem&ssl_keyfile={self.folder}/key.pem"
        )


def secret_of(user: str) -> str:
    """A password for a test's user; odd characters must survive the URL."""
    return f"{user}/p@ss:word"


@asynccontextmanager
async def acl(
    kind: Kind, folder: Path, *, group: str = "demo", world_size: int | None = 3, namespace: str = "rankgate"
) -> AsyncGenerator[Setup]:
    """Users with the least rights only, from an ACL file; the default user is off."""
    users = (admin_user(namespace), *all_users(Keys(namespace, group), world_size=world_size))
    path = folder / "users.acl"
    path.touch()  # empty: the server starts with a default user that answers when it is asked whether it is ready
    async with RealServer(kind=kind, transport="tcp", config=[f"aclfile {path}"]) as server:
        path.write_text(acl_file((user, hashed(secret_of(user.name))) for user in users))
        async with administered(server.url) as clients:
            await clients[0].execute_command("ACL LOAD")

        def url(role: str) -> str:
            user = next(
                user.name for user in users if user.name.endswith((f".{role}", f".{role.split('-', maxsplit=1)[0]}s"))
            )
            return f"redis://{user}:{quote(secret_of(user), safe='')}@{LOOPBACK}:{server.port}/0"

        async with administered(url("admin")) as clients:
            yield Setup("ACL users", url, clients)


SETUPS: dict[str, Any] = {
    "one server": one_server,
    "password": password,
    "sentinel": sentinel,
    "cluster": cluster,
    "tls": tls,
    "acl": acl,
}
