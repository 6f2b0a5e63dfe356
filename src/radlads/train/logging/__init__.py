"""Where a run's metrics go, and what is measured of its speed."""
