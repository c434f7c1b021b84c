"""The peers: a script each, run as ``python -m peers.NAME JOB`` in a process of its own; see `peers.protocol`."""
