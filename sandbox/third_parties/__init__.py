"""
The third parties of a development machine: a Slack, a mail server and a webhook receiver.

All speak the real protocols on loopback, show what they received on one page, and misbehave
on request. `python -m sandbox.third_parties` runs them all in one process.
"""
