"""The code that talks to the store: connections, scripts, keys, wake-ups."""

__all__: list[str] = []
