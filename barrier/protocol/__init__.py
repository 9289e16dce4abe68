"""What ranks and planners say to one another, and what follows from it. No module in here waits, or uses a store."""

__all__: list[str] = []
