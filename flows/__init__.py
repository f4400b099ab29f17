"""Prefect flows, the triptych command line, and reports. The only package that imports prefect."""
