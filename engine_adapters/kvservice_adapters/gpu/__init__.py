"""gpu: blocks through a buffer in the engine's GPU memory, and the kernels between it and the cache. See DESIGN.md."""
