"""Rank and world size of this process, and the rendezvous of ranks on one machine."""
