"""One folder a framework, the same file names in each; only `ocrnet.engine` imports them."""
