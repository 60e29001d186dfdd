"""The store: lookups, leases, staging and write-through over the tiers."""

from kvtier.store.base import Match, Reservation, Run, StoreClient, ticket_slot
from kvtier.store.opening import open_tiers
from kvtier.store.tiered import TieredStore

__all__ = ["Match", "Reservation", "Run", "StoreClient", "TieredStore", "open_tiers", "ticket_slot"]
