"""Boreal's tests. The tree below mirrors the packages."""

# Sets what gRPC reads of the environment, before any test imports that.
import boreal.rpc  # noqa: F401
