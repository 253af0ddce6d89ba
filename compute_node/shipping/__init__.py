"""The parts of `compute_node.shipper`: the window of the log, what all links share, one link."""
