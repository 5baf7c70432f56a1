"""VORTA as a search: trained routers, written down as a table by noise level."""
