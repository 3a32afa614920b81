"""
The event contract: what an outbox document is, whoever wrote it.

Everyone imports it; it imports nothing of ours and does no I/O. `docs/outbox.md` tells the same
to writers in other languages.
"""
