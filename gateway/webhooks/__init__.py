"""Tells clients' own addresses of their tasks, as Standard Webhooks. `python -m gateway.webhooks` is who does so.

The gateway itself only checks an address by its form (`targets`) and tells tenants their secret (`routes`).
"""
