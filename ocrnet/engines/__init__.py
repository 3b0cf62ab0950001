"""Engines: one interface (`base`), implemented in one folder per framework and created by `factory`."""
