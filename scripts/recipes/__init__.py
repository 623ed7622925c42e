"""Small synthetic data sets with which every recipe runs offline."""
