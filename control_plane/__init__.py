"""The control plane: who is a member, who writes, under which epoch. Never on the data path."""
