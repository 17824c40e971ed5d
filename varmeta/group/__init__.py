"""Processes that share the tasks of a fit and add up what each of them works out; no Pyro."""
