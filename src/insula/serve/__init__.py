"""A policy server: openpi's protocol over WebSocket, batched, guarded, observed.

connection ─► client.protocol ─► observations ─► batching ─► backend (on a thread of its own)
bytes          arrays            names, checks     tickets      chunks of actions
"""
