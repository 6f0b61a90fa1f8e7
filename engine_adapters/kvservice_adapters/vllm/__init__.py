"""vllm: the adapter for vLLM: a KV connector, loaded by name. See DESIGN.md beside this file, and docs/vllm.md.

connector    what vLLM calls; every hook fails open
scheduler    the half in the scheduler: what to load and save; asks through `lookups`, in a thread
worker       the half beside the model: moves blocks, through `transfers`, in threads
layout       where a block's bytes lie in the engine's KV tensors
truncation   what a request says of a conversation that was cut, and the names that makes
positions    how the model's keys carry positions, proved on its own rotary embedding; keys: where they stand in a block
hashing      what names a block, and what names everything that makes bytes incompatible

Nothing is imported here: what needs no vLLM can be used without one.
"""
