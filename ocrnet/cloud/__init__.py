"""Object stores and shared folders: the source of data and weights, and the destination of a run's results."""
