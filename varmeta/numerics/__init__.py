"""Minimise, solve and differentiate many small problems at once; torch only, and no word of
tasks.
"""
