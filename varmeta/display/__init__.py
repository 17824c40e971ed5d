"""How objects show themselves in a notebook, and versions for a bug report."""
