"""The rank of this process, and how the ranks find each other."""
