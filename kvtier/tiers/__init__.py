"""Where blocks live: the tier protocol, and memory, disk and S3 behind it."""

from kvtier.tiers.base import Buffer, Deliver, DeliverFile, NotesUse, ReadsFiles, StoredBlock, Tier

__all__ = ["Buffer", "Deliver", "DeliverFile", "NotesUse", "ReadsFiles", "StoredBlock", "Tier"]
