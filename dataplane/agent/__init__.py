"""The agent: the node's streams to the control plane, last-known-good, identity, ledger forwarding, metrics
endpoint.
"""
