"""Procedural street scenes: a camera, a canvas that draws image and label together, and the objects in a street."""
