"""kvservice_adapters: engines on one side, the client library on the other.

`hashing` and `service` know no engine. `vllm` is a KV connector for vLLM, `transformers` the adapter for Hugging Face
transformers, `serving` a small serving loop on the latter. Every adapter fails open: whatever happens to the daemon,
the engine recomputes.
"""
