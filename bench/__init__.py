"""`make bench`: Boreal, a stock PostgreSQL quorum and a lone PostgreSQL, side by side in one run.

plan        what is run: scripts, clients, systems, and in which order
systems     the things compared, each started fresh and removed afterwards
postgres    one stock PostgreSQL server, the block the stock systems are built of
load        pgbench: one run of it, and what its output says
accounting  CPU time by kind of process
runner      one measurement after the other, and the waiting between them
report      the table and the JSON file
machine     what the figures were taken on

Two more commands measure Boreal by itself, on a cluster of their own (`single`):

cold        `python -m bench.cold`: reads by a compute node that has nothing yet
soak        `make soak`: does it keep its size, its memory and its word for half an hour?
"""
