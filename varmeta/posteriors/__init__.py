"""Draw, predict, score, diagnose, export."""
