"""Exported files: writing, comparing and opening them."""
