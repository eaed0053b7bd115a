"""The command line, the Python client and the local stack."""
