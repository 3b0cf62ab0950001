"""Foreign weight names and canonical names: one small table a family."""
