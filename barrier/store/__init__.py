"""All that knows redis-py: connections, scripts, keys, wake-ups."""

__all__: list[str] = []
