"""Runs inside a runner's container, with the credentials that the runner has there, as somebody would who has taken it over.

Reads a JSON list of commands from stdin, each a list of words; prints a JSON list with ``ok`` or what was wrong for each.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError


def attempt(url: str, words: list[str]) -> str:
    """Send one command on a connection of its own: some of them change what follows."""
    untyped: Any = Redis
    client: Any = untyped.from_url(url, socket_timeout=5)
    try:
        client.execute_command(*words)
    except NoPermissionError:
        return "NOPERM"
    except AuthenticationError:
        return "WRONGPASS"
    except ResponseError as error:
        return str(error)[:100]
    except RedisError as error:
        return type(error).__name__
    finally:
        client.close()
    return "ok"


def main() -> None:
    """Try all of them."""
    password = Path(os.environ["RANKGATE_REDIS_PASSWORD_FILE"]).read_text(encoding="utf-8").strip()
    url = os.environ["RANKGATE_REDIS"].replace("@", f":{quote(password, safe='')}@", 1)
    commands: list[list[str]] = json.load(sys.stdin)
    print(json.dumps([attempt(url, words) for words in commands]))


if __name__ == "__main__":
    main()
