"""Generated stubs (`make proto`) and `edge`, where Boreal's types and errors meet gRPC's."""

import os

# We start other programs but never fork a process that goes on with gRPC; its handlers for that
# would only tell our logs of every start. Read when grpc is first imported, which is after this.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
