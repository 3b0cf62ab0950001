"""Engines: one interface (`base`), created by `factory`, with one folder for each framework."""
