"""
The installation step: everything that the servers must hold before a process starts.

Its commands run from the product's own image, with permissions that no process has. Each is
idempotent: it compares, creates what is missing, and corrects what differs.
"""
