"""The record of a run: its folder, curves, TensorBoard files and tracking services."""
