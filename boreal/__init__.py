"""What the three services share: types, errors, the quorum core, PostgreSQL's formats, the CLI."""
