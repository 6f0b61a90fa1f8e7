"""device: copies between the arena and GPU memory that engines registered, by copy engines only.

Read DESIGN.md beside this. `plane` is what the store uses; `gpu` owns the streams and threads of one GPU;
`registration` is one engine's KV cache; `progress` the words by which it follows its copies.
"""

from kvservice.device.plane import DevicePlane
from kvservice.device.progress import LANES
from kvservice.device.registration import Copy, Region, Registration

__all__ = ["LANES", "Copy", "DevicePlane", "Region", "Registration"]
