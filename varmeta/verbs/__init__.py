"""fit, meta_gradient, compare, reachability."""
