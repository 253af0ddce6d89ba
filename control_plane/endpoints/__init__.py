"""The writer endpoint and the reader endpoint: two ports that stay, whoever serves behind them.

An endpoint accepts a client's connection, chooses an instance by its role, and hands the instance's
PostgreSQL *the connection itself*: the descriptor, over a unix socket (`handover`,
`compute_node/shim/connections.c`). From then on no byte passes through this process; it may even
die. So a query costs nothing here, and client addresses, pg_hba.conf and timeouts are PostgreSQL's.
An unused copy of the connection is kept, by which the sessions of a writer that was deposed are
ended (`sessions`). Where the two share no directory the connection is relayed (`relay`).

Before it chooses, it looks at the client's first message without taking it (`greeting`):

- A request to cancel goes to every instance, for only the one that gave out its key can tell whose
  it is, and the client sends it to the endpoint.
- Requests for TLS or GSS encryption are declined here, in PostgreSQL's words. The PostgreSQL we run
  is built without either and would decline them itself; but then the cancel requests of current
  drivers, which ask for encryption first, would reach one instance only.

While nobody can take a client of the writer's, or of the readers', endpoint, its connection waits,
within bounds, for the routing to change (`server`).

`choice` and `greeting` are pure; `directory` keeps what is known of the instances, `watch` learns
it from the control plane, `handover` and `cancel` talk to PostgreSQL, `server` to clients.
"""
