"""Which rank this process is, and how the ranks find each other."""
