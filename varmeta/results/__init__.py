"""`Fit`: what was learned, printed, doubted, stored."""
