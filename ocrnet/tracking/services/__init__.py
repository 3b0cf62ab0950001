"""The tracking services Weights & Biases and MLflow, each in a separate process."""
