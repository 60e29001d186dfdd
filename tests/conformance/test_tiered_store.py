"""The in-process store as a store client."""

from tests.conformance.store_suite import StoreSuite
from tests.store_support import make_store


class TestTieredStore(StoreSuite):
    def make_client(self, tiers=(), **options):
        return make_store(tiers, **options)
