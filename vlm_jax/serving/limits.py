"""What one request may ask for, and the HTTP errors that say so, in the form in which OpenAI's clients read them."""

from __future__ import annotations

import dataclasses

from vlm_jax.settings.checks import check_positive

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of a request and of the server."""

    rows: int = 8  # answers that grow at the same time
    queue: int = 64  # requests that wait for a row; more are told to come again
    timeout_s: float = 120.0  # from a request's arrival to the end of its answer
    image_mib: float = 20.0  # of one encoded picture
    image_pixels: int = 50_000_000  # of one picture
    images: int = 1  # of one request
    prompt_tokens: int = 1024  # visual tokens included
    max_new_tokens: int = 512  # of one answer
    remote_images: bool = False  # whether http(s) addresses of pictures are fetched

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        del sizes["remote_images"]
        check_positive("serve", **sizes)

    @property
    def body_bytes(self) -> int:
        """Of a request: its pictures in base64, and a megabyte of text."""
        return int(self.images * self.image_mib * MIB * 4 / 3) + MIB


class Refused(Exception):
    """An error for the client. status: of HTTP; kind, code: as OpenAI's API names them."""

    def __init__(self, status: int, message: str, code: str = "", kind: str = "", retry_s: int = 0):
        super().__init__(message)
        self.status, self.code, self.retry_s = status, code, retry_s
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")

    @property
    def body(self) -> dict:
        """The JSON that clients expect."""
        return {"error": {"message": str(self), "type": self.kind, "param": None, "code": self.code or None}}  # fmt: skip


def busy(waiting: int) -> Refused:
    """The queue is full."""
    message = f"{waiting} requests wait already; try again in a few seconds."
    return Refused(429, message, "queue_full", "rate_limit_error", retry_s=2)


def late(seconds: float) -> Refused:
    """The answer took too long."""
    return Refused(504, f"the answer was not complete after {seconds:g} s; ask for fewer tokens.", "timeout")  # fmt: skip
