"""Several evaluated runs side by side, and beside what papers published."""
