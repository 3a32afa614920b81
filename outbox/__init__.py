"""
The event contract: the shape of an outbox document, for every writer.

Every other package may import it; it imports none of them and does no I/O. `docs/outbox.md`
describes the same contract for writers in other languages.
"""
