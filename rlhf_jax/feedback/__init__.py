"""Human feedback: single ratings, comparisons made of them, their quality, and baselines to hold a model against."""
