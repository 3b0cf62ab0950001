"""The MindSpore engine."""
