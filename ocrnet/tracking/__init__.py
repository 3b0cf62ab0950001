"""The record of a run: its folder, curves, TensorBoard, tracking services."""
