"""
compose.yml and Dockerfile as they are, really built, started, hurt, upgraded and removed again.

    python -m tests.compose

On a machine without an image registry they run on the stand-ins of deploy/offline.
"""
