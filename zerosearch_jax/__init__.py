"""ZeroSearch in JAX: a language model learns to search, another one plays the search engine."""
