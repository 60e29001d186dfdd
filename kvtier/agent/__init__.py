"""The node agent: one process that owns memory and tiers for all engines of a node, and its client.

Engines use `kvtier.agent.client.connect`; `kvtier.agent.process.serve` is the agent. Nothing is imported
here, so that a process that starts as an agent detaches from its engine quickly.
"""
