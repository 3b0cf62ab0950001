"""Small modules that need nothing else of the package."""
