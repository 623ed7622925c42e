"""Small data sets, made up, on which every recipe runs without a network."""
