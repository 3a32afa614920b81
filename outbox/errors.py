"""
What can be wrong with an event before it is on its way.

    OutboxError
    ├── UnfitEvent       a document that nobody could publish; parked with this reason
    └── UndecodableBody  a message body that is no event of ours; dead-lettered with this reason
"""


class OutboxError(Exception):
    """The root: catch it to catch whatever this package raises."""


class UnfitEvent(OutboxError):
    """
    The document does not fit the contract.

    code: one of the `UNFIT_*` words below; operators query them.
    detail: which field, what it holds and what it should hold. Never the payload itself.
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
