"""What the connectors of all engines are made of: the shared store, slots, copies, hashes, identity."""
