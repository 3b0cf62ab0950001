"""Weights & Biases and MLflow, each in a process of its own."""
