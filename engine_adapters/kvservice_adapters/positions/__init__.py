"""positions: what a model's keys say of where their tokens stand, and how saved keys move when their tokens do.

Rotary positions (RoPE) multiply a key by R(p), a rotation whose angles are p times fixed frequencies. Rotations
compose, R(q) = R(q - p) R(p), so a key saved at position p serves at q after one more rotation. Values carry no
position. Used by every adapter, inside the engine's process; the service itself never touches keys.
"""

from kvservice_adapters.positions.rope import Rope, RopeForm, UnsupportedPositions, rope_of_config
from kvservice_adapters.positions.rotation import Turn, cosine_and_sine, moved, turn_between

__all__ = [
    "Rope",
    "RopeForm",
    "Turn",
    "UnsupportedPositions",
    "cosine_and_sine",
    "moved",
    "rope_of_config",
    "turn_between",
]
