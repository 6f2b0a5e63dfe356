"""A run's page and plots, from the files in its folder."""
