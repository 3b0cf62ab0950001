"""Small modules without dependencies inside the package."""
