"""Engines that a runner can drive. Each is named by a factory, ``package.module:name``, and is imported only where it runs."""

__all__: list[str] = []
