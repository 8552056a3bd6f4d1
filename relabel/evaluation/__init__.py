"""Predictions of a network and their accuracy, by single and by multiple labels."""
