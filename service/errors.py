"""Every refusal and failure that a client or an operator can meet, as one tree.

Standard library only: each layer may import it. `service/api/errors.py` renders the tree in the
dialect of the path; nothing else turns an exception into bytes.

    ServiceError
     +- InvalidRequest           400  the request itself is wrong; `param` names the field
     |   +- ContextLengthExceeded 400
     |   +- DeadlineTooShort     400  no load but the prompt's own length stands in the way
     +- Unauthorized             401  every reason with the same bytes; `reason` is for the operator only
     |   +- CredentialRevoked    401  in mid-stream
     +- Forbidden                403  the credential is good, but not for this
     |   +- UnknownLimits        403  its plan is not in the configuration, or its own limits are no limits
     +- NotFound                 404
     +- MethodNotAllowed         405
     +- RequestTimeout           408  the client was too slow to send its request
     +- PayloadTooLarge          413
     +- UnsupportedMediaType     415
     +- LimitExceeded            429  the client's own limit, never our overload
     |   +- RateLimited          429  requests in a minute or a second; failed credentials of an address
     |   +- TokenLimited         429  tokens in a minute
     |   +- TooManyConcurrent    429
     |   +- QuotaExhausted       429  of the day or the month: an SDK's retry cannot help
     +- RequestHeadTooLarge      431  request line and headers, refused before there is a request
     +- Internal                 500
     |   +- GenerationFailed     500  tokens may have been spent: never retried by an SDK
     +- Unavailable              503
     |   +- NotReady             503  loading, warming or failed
     |   +- QueueFull            503
     |   +- DeadlineUnreachable  503  it would still be waiting when its time is over
     |   +- Draining             503
     |   +- EngineFailed         503
     |   +- StorageUnavailable   503  the database cannot be asked; never taken for a wrong credential
     |   +- IssuerUnavailable    503  no key of a token's issuer was ever had, or not for long
     +- DeadlineExceeded         504  `phase` says where the time went
     +- ModelUnavailable              an operator's problem; never reaches a client as such
         +- NotEnoughMemory           at the moment: it may pass
         +- ModelTooLarge             for this device: it will not
"""

from __future__ import annotations

from typing import ClassVar


class ServiceError(Exception):
    """Base of the tree.

    `status` is the HTTP status, `code` the stable machine-readable name, `param` the offending field
    (or None), `retry_after` seconds (or None), `should_retry` overrides what an SDK would do by status.
    `message` is written for the client: it never holds another tenant's data nor an echo of the input.
    """

    status: ClassVar[int] = 500
    code: str = "internal_error"
    should_retry: bool | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        if code is not None:
            self.code = code


class InvalidRequest(ServiceError):
    status = 400
    code = "invalid_request"


class ContextLengthExceeded(InvalidRequest):
    """The prompt leaves no room for a token. The wording is what LiteLLM and agents recognise."""

    code = "context_length_exceeded"

    def __init__(self, *, context_length: int, prompt_tokens: int, at_least: bool = False) -> None:
        amount = f"at least {prompt_tokens}" if at_least else f"{prompt_tokens}"
        super().__init__(
            f"This model's maximum context length is {context_length} tokens. However, your prompt has "
            f"{amount} tokens. Please shorten it.",
            param="prompt",
        )


class DeadlineTooShort(InvalidRequest):
    """Reading the prompt takes longer than the request may: true at any load, so no retry helps."""

    code = "deadline_too_short"
    should_retry = False


class Unauthorized(ServiceError):
    """The one answer to every credential that does not let in.

    `reason` is a short snake_case word from a closed set, for metrics, audit and `mlxd token verify`.
    """

    status = 401
    code = "invalid_credentials"
    should_retry = False

    def __init__(self, reason: str) -> None:
        super().__init__("A valid API key or token is required.")
        self.reason = reason


class Forbidden(ServiceError):
    status = 403
    code = "permission_denied"
    should_retry = False


class UnknownLimits(Forbidden):
    """Nothing is allowed to a credential whose limits cannot be told. `reason` is for the operator."""

    code = "unknown_limits"

    def __init__(self, reason: str) -> None:
        super().__init__("The limits of this credential cannot be told; ask the operator.")
        self.reason = reason


class NotFound(ServiceError):
    status = 404
    code = "not_found"


class MethodNotAllowed(ServiceError):
    status = 405
    code = "method_not_allowed"


class RequestTimeout(ServiceError):
    status = 408
    code = "request_timeout"
    should_retry = False


class PayloadTooLarge(ServiceError):
    status = 413
    code = "request_too_large"


class UnsupportedMediaType(ServiceError):
    status = 415
    code = "unsupported_media_type"


class LimitExceeded(ServiceError):
    status = 429
    code = "rate_limit_exceeded"


class RateLimited(LimitExceeded):
    code = "rate_limit_requests"


class TokenLimited(LimitExceeded):
    code = "rate_limit_tokens"


class TooManyConcurrent(LimitExceeded):
    code = "concurrency_limit"


class QuotaExhausted(LimitExceeded):
    code = "quota_exhausted"
    should_retry = False


class RequestHeadTooLarge(ServiceError):
    status = 431
    code = "request_head_too_large"


class Internal(ServiceError):
    status = 500
    code = "internal_error"


class GenerationFailed(Internal):
    code = "generation_failed"
    should_retry = False


class Unavailable(ServiceError):
    status = 503
    code = "unavailable"


class NotReady(Unavailable):
    code = "not_ready"


class QueueFull(Unavailable):
    code = "queue_full"


class DeadlineUnreachable(Unavailable):
    """`retry_after`: when the same request would have its first token in time, if nobody else came."""

    code = "deadline_unreachable"
    should_retry = True


class Draining(Unavailable):
    code = "draining"


class EngineFailed(Unavailable):
    code = "engine_failed"


class StorageUnavailable(Unavailable):
    code = "storage_unavailable"


class IssuerUnavailable(Unavailable):
    """A token cannot be verified because its issuer's keys cannot be had; its own 401 would be a guess."""

    code = "issuer_unavailable"


class CredentialRevoked(Unauthorized):
    """A running request whose credential was revoked or changed; sent as an event in a stream."""

    code = "credential_revoked"


class DeadlineExceeded(ServiceError):
    """`phase` is where the deadline ran out: queue, prefill or decode."""

    status = 504
    code = "deadline_exceeded"
    should_retry = False

    def __init__(self, phase: str) -> None:
        super().__init__(f"The deadline of this request ran out in {phase}.")
        self.phase = phase


class ModelUnavailable(ServiceError):
    """The configured model cannot be had; the message tells the operator what to do."""

    status = 503
    code = "model_unavailable"


class NotEnoughMemory(ModelUnavailable):
    """Less memory is free than the model needs."""


class ModelTooLarge(ModelUnavailable):
    """The model needs more than the device has, however much of it is free."""
