"""Take steps: Newton, L-BFGS, Adam; eager, compiled, by groups of tasks."""
