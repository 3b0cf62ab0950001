"""The command `ocrnet`: one module per command."""
