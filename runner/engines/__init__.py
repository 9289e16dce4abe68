"""Engines that a runner can drive. A factory names each one (``package.module:name``). An engine is imported only in the process that runs it."""

__all__: list[str] = []
