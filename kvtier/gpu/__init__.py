"""GPU helpers that do not know any engine: page-locking the arena."""

from kvtier.gpu.pin import PinnedMemory, pin

__all__ = ["PinnedMemory", "pin"]
