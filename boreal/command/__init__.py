"""The `boreal` command. main.py has the verbs; what they do is in the other modules.

A verb imports what it needs when it runs: `boreal dsn` must not wait for gRPC to load.
"""
