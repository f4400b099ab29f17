"""Prefect flows, the triptych command line, and reports. The only package that imports prefect."""

import os

# Set before Prefect or Ray is imported; a value from outside wins.
# The temporary Prefect server takes 25 s to start on two cores; Prefect's own limit is 20 s.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
# Nothing is sent anywhere unless the user switches it on.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# OpenMP threads that spin while they wait made steps ten times slower on a busy CPU.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
