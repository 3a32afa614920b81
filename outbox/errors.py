"""
Errors of an event before it is published, and of a message body that is read.

    OutboxError
    ├── UnfitEvent       a document that cannot be published; it is parked with this reason
    └── UndecodableBody  a message body that is not an event; it is dead-lettered with this reason
"""


class OutboxError(Exception):
    """The root of the errors defined here."""


class UnfitEvent(OutboxError):
    """
    The document does not fit the contract.

    code: one of the `UNFIT_*` words below; operators query them.
    detail: the field, what it holds and what it should hold; never the payload itself.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


class UndecodableBody(OutboxError):
    """The body is not a CloudEvents 1.0 JSON event."""


UNFIT_MISSING = "field_missing"
UNFIT_TYPE = "field_of_wrong_type"
UNFIT_LENGTH = "field_too_long"
UNFIT_PAYLOAD_SIZE = "payload_too_large"
UNFIT_ID = "id_unusable"
