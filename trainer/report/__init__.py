"""A page about runs: curves, experts, alarms. report_data holds the numbers, the rest draws them."""
