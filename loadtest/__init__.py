"""Load tests: locust users that speak public HTTP only, to this machine only."""
