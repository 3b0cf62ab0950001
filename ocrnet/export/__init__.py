"""Write, compare and open exported files."""
