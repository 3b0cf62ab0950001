"""Training: setup and loop."""
