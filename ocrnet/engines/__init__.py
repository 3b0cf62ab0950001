"""One folder a framework, the same file names in each; only `ocrnet.engines.base` imports them."""
