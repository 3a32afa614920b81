"""
What can prevent the sandbox from running. Each message says what is wrong and what to do.

SandboxError
├── ServerMissingError       a server is not available on this machine: one line with the remedy
├── InstallationFailedError  the package manager failed
├── ServerFailedError        a server of ours ended, or did not answer in time: with its last words
└── NotOursError             a server given by a URL must not be stopped or damaged
"""


class SandboxError(Exception):
    pass


class ServerMissingError(SandboxError):
    pass


class InstallationFailedError(SandboxError):
    pass


class ServerFailedError(SandboxError):
    pass


class NotOursError(SandboxError):
    def __init__(self, variable: str) -> None:
        super().__init__(f"the server given by {variable} is not ours to hurt: unset {variable}")
