"""Generated stubs (`make proto`) and `edge`, where Boreal's types and errors meet gRPC's."""
