"""
The domain: a request for assistance, its deliveries, and the rules of both state machines.

Pure: decides, never acts. The processes read and write what it decides.
"""
