"""vllm: the adapter for vLLM: a KV connector, loaded by name. See DESIGN.md beside this file, and docs/vllm.md.

connector    what vLLM calls; every hook fails open
scheduler    the half in the scheduler: what to load and save; asks through `lookups`, in a thread
worker       the half beside the model: moves blocks, through `transfers`, in threads
layout       where a block's bytes lie in the engine's KV tensors
hashing      what names a block, and what names everything that makes bytes incompatible

Nothing is imported here: what needs no vLLM can be used without one.
"""
