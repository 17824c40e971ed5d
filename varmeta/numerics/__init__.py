"""Minimise, solve and differentiate many small problems at once; torch only, no tasks."""
