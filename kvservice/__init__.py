"""kvservice: a node-local KV-cache store for LLM engines."""

__version__ = "0.1.0"
