"""What methods that edit weights share: the search for v*, keys, covariances, solvers, layers."""
