"""Procedural street scenes: a camera, a canvas that draws image and label as one, and what stands in a street."""
