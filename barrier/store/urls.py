"""Checks a store's URL: a part that is not understood is refused with a sentence, and never ignored.

redis-py ignores a database that is no number, reads ``/0/7`` as database 7, and takes ``ssl_check_hostname=flase`` for yes.
"""

from __future__ import annotations

import difflib
import inspect
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl

from redis.asyncio.connection import (
    URL_QUERY_ARGUMENT_PARSERS,
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
)

from barrier.errors import InvalidSettings
from barrier.log import logger
from barrier.protocol.names import shown

__all__ = ["NO", "OURS", "YES", "check_tls_files", "options"]


OURS = ("password_file", "sentinel_username", "sentinel_password", "sentinel_password_file", "sentinel_tls")
"""The options after a URL's ``?`` that are ours and not redis-py's."""

YES, NO = ("true", "yes", "1"), ("false", "no", "0")
_CERTIFICATES = ("none", "optional", "required")
_NOT_FOR_URLS = frozenset(
    {
        "self",
        "args",
        "kwargs",
        "host",
        "port",
        "path",
        "retry",
        "retry_on_error",
        "redis_connect_func",
        "credential_provider",
    }
    | {"parser_class", "encoder_class", "command_packer", "event_dispatcher", "driver_info", "lib_name", "lib_version"}
)
_CHOSEN_HERE = frozenset(
    {"socket_timeout", "socket_connect_timeout", "socket_keepalive", "socket_keepalive_options", "retry_on_timeout"}
    | {"health_check_interval", "decode_responses", "protocol", "max_connections", "timeout", "legacy_responses"}
)
"""The options that rankgate sets itself, because a guarantee depends on them."""


def options(parts: SplitResult) -> dict[str, str]:
    """What a URL says after its ``?``.

    Raises:
        InvalidSettings: something else in the URL would be ignored, or an option is unknown, given twice, or has a value that it cannot have.
    """
    scheme, _, kind = parts.scheme.partition("+")
    if parts.fragment:
        raise InvalidSettings(
            f"the {parts.scheme}:// URL has a #, and what follows it would be ignored: in a password a # is written %23"
        )
    _check_place(parts, scheme, kind)
    found: dict[str, str] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name in found:
            raise InvalidSettings(f"the {parts.scheme}:// URL says {_named(name, found)} twice: leave one of them out")
        _check_option(name, value, found, parts.scheme)
        found[name] = value
    if "db" in found and (parts.path.strip("/") if not kind else True) and scheme != "unix":
        raise InvalidSettings(
            f"the {parts.scheme}:// URL says db={shown(found['db'])} after its ?: say the database in the path, as in "
            f"{parts.scheme}://host:port/0"
            if not kind
            else f"the {parts.scheme}:// URL says db after its ?: say the database in the path, see barrier.connect"
        )
    if told := sorted(_CHOSEN_HERE & found.keys()):
        logger.warning("the store's URL says {}, which rankgate sets itself: it has no effect", ", ".join(told))
    return found


def _check_place(parts: SplitResult, scheme: str, kind: str) -> None:
    place = parts.netloc.rpartition("@")[2]
    if "@" in parts.path or "@" in parts.query:
        raise InvalidSettings(
            f"the {parts.scheme}:// URL has an @ behind its host: in a password / is written %2F, ? is %3F and @ is %40"
        )
    if scheme == "unix":
        if place or not parts.path.strip("/"):
            raise InvalidSettings("a socket's URL is unix:///path/to/socket, with three slashes")
        return
    if kind:
        return
    if "," in place:
        raise InvalidSettings(
            f"the {parts.scheme}:// URL has several hosts: use redis+sentinel://a,b/service/0 for sentinels, or "
            "redis+cluster://a,b for a cluster"
        )
    database = parts.path.removeprefix("/")
    if database and not (database.isascii() and database.isdigit()):
        raise InvalidSettings(
            f"the {parts.scheme}:// URL ends with {shown(parts.path)}, and a database must be a number: "
            f"{parts.scheme}://host:port/0"
        )


def _check_option(name: str, value: str, before: Mapping[str, str], scheme: str) -> None:
    known = _known(scheme)
    if name not in known:
        raise InvalidSettings(f"the {scheme}:// URL says {_unknown(name, before, scheme, known)}")
    if not value:
        raise InvalidSettings(f"the {scheme}:// URL says {name} without a value: {name}=…")
    parser: Any = URL_QUERY_ARGUMENT_PARSERS.get(name)
    if name == "sentinel_tls" or getattr(parser, "__name__", "") == "to_bool":
        if value.lower() not in YES + NO:
            raise InvalidSettings(f"the {scheme}:// URL says {name}={shown(value)}; it must be true or false")
    elif name == "ssl_cert_reqs":
        if value not in _CERTIFICATES:
            raise InvalidSettings(
                f"the {scheme}:// URL says {name}={shown(value)}; it must be one of {', '.join(_CERTIFICATES)}"
            )
    elif parser is not None:
        try:
            parser(value)
        except (ValueError, TypeError, AttributeError):
            raise InvalidSettings(
                f"the {scheme}:// URL says {name}={shown(value)}, which is not a valid value"
            ) from None


def _unknown(name: str, before: Mapping[str, str], scheme: str, known: frozenset[str]) -> str:
    word = _named(name, before)
    if word != name:
        return f"{word} after its ?, which is not understood: in a password & is written %26"
    if name.startswith("ssl_") and not scheme.startswith("rediss"):
        return (
            f"{name}, which is for TLS: use {scheme.replace('redis', 'rediss', 1) if scheme != 'unix' else 'rediss'}://"
        )
    if name.startswith("sentinel_"):
        return f"{name}, which is for sentinels: use redis+sentinel://"
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f"{name} after its ?, which is not understood" + (
        f": did you mean {near[0]}?" if near else ": see barrier.connect"
    )


def _named(name: str, before: Mapping[str, str]) -> str:
    """The option's name, or "something" if it may be a part of a password that has an & in it."""
    looks_like_one = name.isascii() and name.replace("_", "").isalpha() and name.islower() and len(name) <= 40
    return name if looks_like_one and not any(one.endswith("password") for one in before) else "something"


def _known(scheme: str) -> frozenset[str]:
    kind: type[AbstractConnection] = (
        UnixDomainSocketConnection if scheme == "unix" else SSLConnection if scheme.startswith("rediss") else Connection
    )
    taken = {name for base in kind.__mro__ for name in inspect.signature(base.__init__).parameters}
    taken |= _CHOSEN_HERE | {"db", "username", "password", "password_file", "client_name"}
    if "sentinel" in scheme:
        taken |= set(OURS)
    return frozenset(taken - _NOT_FOR_URLS)


# --- files ----------------------------------------------------------------------------------------------------------------


def check_tls_files(kwargs: Mapping[str, Any]) -> None:
    """Refuse certificates and keys that cannot be used, each with its name: OpenSSL's own errors name no file.

    Raises:
        InvalidSettings: a file cannot be read, is not what it should be, or a key is not that of its certificate.
    """
    for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
        if path := kwargs.get(name):
            try:
                with Path(path).open("rb") as file:
                    file.read(1)
            except OSError as error:
                raise InvalidSettings(f"{name} {path} cannot be read: {error.strerror or error}") from None
    if (folder := kwargs.get("ssl_ca_path")) and not Path(folder).is_dir():
        raise InvalidSettings(f"ssl_ca_path {folder} is no folder")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if path := kwargs.get("ssl_ca_certs"):
        try:
            context.load_verify_locations(cafile=path)
        except ssl.SSLError:
            raise InvalidSettings(f"ssl_ca_certs {path} holds no certificate in PEM form") from None
    certificate, key = kwargs.get("ssl_certfile"), kwargs.get("ssl_keyfile")
    if key and not certificate:
        raise InvalidSettings(f"ssl_keyfile {key} is given without ssl_certfile: a key needs its certificate")
    if certificate:
        _check_pair(context, certificate, key, kwargs.get("ssl_password"))


def _check_pair(context: ssl.SSLContext, certificate: str, key: str | None, password: str | None) -> None:
    asked = False

    def secret() -> str:  # without this, OpenSSL asks at the terminal, and waits
        nonlocal asked
        asked = True
        return password or ""

    names = f"ssl_certfile {certificate}" + (
        f" and ssl_keyfile {key}" if key else " (which must hold the key too, without ssl_keyfile)"
    )
    try:
        context.load_cert_chain(certificate, key, secret)
    except ssl.SSLError as error:
        if asked:
            why = "ssl_password is wrong" if password else "it needs ssl_password"
            raise InvalidSettings(f"the key in {key or certificate} is encrypted, and {why}") from None
        if error.reason == "KEY_VALUES_MISMATCH":
            raise InvalidSettings(f"{names} do not belong together: the key is of another certificate") from None
        raise InvalidSettings(f"{names} cannot be used: there must be a certificate and its key in PEM form") from None
    except ValueError:  # a password that is too long
        raise InvalidSettings(f"the key in {key or certificate} is encrypted, and ssl_password is wrong") from None
