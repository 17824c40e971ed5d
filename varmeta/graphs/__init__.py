"""Run a pure tensor function as a compiled graph; torch only."""
