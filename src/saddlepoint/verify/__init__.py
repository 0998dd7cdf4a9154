"""Proofs: bounds of what a network can answer within a set."""
