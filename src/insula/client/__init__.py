"""The robot's side of a policy server: the protocol, a client, and the loop a robot runs. It never imports JAX.

from insula.client import Client

with Client("ws://127.0.0.1:8000") as client:
    actions = client.infer({"images": {"front": picture}, "state": state, "task": "put the cup away"}).actions
"""

from insula.client.connection import Client, Reply
from insula.client.plan import Plan, Stitching
from insula.client.protocol import ErrorKind
from insula.client.record import Recorder
from insula.client.runtime import Loop, Robot, RuntimeConfig, Summary

__all__ = ["Client", "ErrorKind", "Loop", "Plan", "Recorder", "Reply", "Robot", "RuntimeConfig", "Stitching", "Summary"]
