"""eta integrated out."""
