"""Refuses bodies that are not JSON by their headers, before they are read."""

from email.message import Message
from http import HTTPMethod

from fastapi import Request

from service.problems import not_json, unsupported_encoding


def check_content_headers(request: Request) -> None:
    """
    Raises Problem (415, RFC 9110 section 15.5.16), naming the header.

    A body without Content-Type is read as JSON: clients of the original service may omit it.
    """
    if request.method != HTTPMethod.POST:
        return
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in {"", "identity"}:
        raise unsupported_encoding()
    content_type = request.headers.get("content-type", "").strip()
    if content_type and not _is_json(content_type):
        raise not_json()


def _is_json(content_type: str) -> bool:
    header = Message()
    header["content-type"] = content_type
    maintype, subtype = header.get_content_maintype(), header.get_content_subtype()
    return maintype == "application" and (subtype == "json" or subtype.endswith("+json"))
