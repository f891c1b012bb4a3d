"""The problems of T variables that methods share: eigenvalues, convex programs, the simplex."""
