"""A network as a graph, and bounds carried through it: what verification, certified training and bound-guided attacks share."""
