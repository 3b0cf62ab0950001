"""The engines: one interface (`base`), opened by `factory`, with a folder for each framework."""
