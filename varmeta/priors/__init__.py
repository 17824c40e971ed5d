"""N(theta0, Lambda^-1), what moves it, and what is believed about it."""
