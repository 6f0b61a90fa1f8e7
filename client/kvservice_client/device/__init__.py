"""device: blocks straight into and out of an engine's GPU memory. Needs numpy and a CUDA driver.

    from kvservice_client.device import DeviceCache, DeviceKV
    kv = DeviceKV(client, DeviceCache.of_tensors([[keys_0, values_0], [keys_1, values_1], ...]))
    load = kv.load(hashes, block_ids)
    load.wait_layer(0, stream)              # ... the stream's work on layer 0; and so on
    kv.save(hashes, block_ids, after=event) # in a thread of the engine's own

Two planes do the work, chosen by what this process and the daemon can do: `ipc`, where the daemon copies, and `mapped`,
where this process copies between the daemon's memory and its GPU itself. `kv.plane` says which, and why.
"""

from kvservice_client.device.cache import CachePart, DeviceCache
from kvservice_client.device.kv import DeviceKV, PlaneInUse
from kvservice_client.device.load import DeviceLoad

__all__ = ["CachePart", "DeviceCache", "DeviceKV", "DeviceLoad", "PlaneInUse"]
