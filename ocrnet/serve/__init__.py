"""The prediction server: HTTP API and web page."""
