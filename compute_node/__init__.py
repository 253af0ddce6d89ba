"""A compute node: stock PostgreSQL whose pages and log live elsewhere, and the agent beside it."""
