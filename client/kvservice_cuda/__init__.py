"""kvservice_cuda: as much of the CUDA driver API as the daemon and the client need, by ctypes from libcuda itself.

No dependency beyond the driver, no Python object per piece of a batch, and every call releases the GIL.
"""
