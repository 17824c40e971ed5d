"""Does varmeta give the answers of lme4, and of long runs of MCMC, on real nested data?"""
