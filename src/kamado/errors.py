"""How a request can fail, and why: one small tree of errors and the reasons behind refusals.

Hono gives an outcome the same number over AMQP and HTTP, so each class carries its status and no other module
spells it. The text of an error may be shown to whoever asked; the `reason` may not: it is for the log and for
the operator's tools, since it would help somebody who guesses (unknown and disabled must look alike).
"""

from enum import StrEnum

__all__ = [
    "BadRequest",
    "Conflict",
    "Forbidden",
    "NotFound",
    "NotSupported",
    "OutcomeUnknown",
    "PreconditionFailed",
    "Reason",
    "RegistryError",
    "TooLarge",
    "Unauthorized",
    "Unavailable",
]


class Reason(StrEnum):
    """Why a look-up or a provisioning was refused. The values are part of the log format and of `kamado explain`."""

    MALFORMED_REQUEST = "malformed-request"
    NO_RIGHT = "no-right"

    TENANT_UNKNOWN = "tenant-unknown"
    TENANT_DISABLED = "tenant-disabled"
    ISSUER_AMBIGUOUS = "issuer-ambiguous"
    """Several tenants of one trust anchor group trust this CA."""

    DEVICE_UNKNOWN = "device-unknown"
    DEVICE_DISABLED = "device-disabled"
    GATEWAY_UNKNOWN = "gateway-unknown"
    GATEWAY_DISABLED = "gateway-disabled"
    GATEWAY_NOT_AUTHORIZED = "gateway-not-authorized"
    DEVICE_AND_GATEWAY_UNKNOWN = "device-and-gateway-unknown"
    DEVICE_UNKNOWN_GATEWAY_DISABLED = "device-unknown-gateway-disabled"
    GATEWAY_MAY_NOT_PROVISION = "gateway-may-not-provision"
    """The device is unknown, and the gateway has no right to bring it along."""
    EDGE_DEVICE_ID_INVALID = "edge-device-id-invalid"

    CREDENTIAL_UNKNOWN = "credential-unknown"
    CREDENTIAL_DISABLED = "credential-disabled"
    CONTEXT_MISMATCH = "context-mismatch"
    """A member of the client context differs from the credential's `ext`."""
    SECRETS_DISABLED = "secrets-disabled"
    SECRETS_EXPIRED = "secrets-expired"
    SECRETS_NOT_YET_VALID = "secrets-not-yet-valid"
    SEARCH_BY_DEVICE_ID = "search-by-device-id"

    NO_CERTIFICATE = "no-certificate"
    """Nothing is registered and the adapter sent no client certificate, so nothing can be provisioned."""
    CERTIFICATE_UNREADABLE = "certificate-unreadable"
    TYPE_NOT_PROVISIONED = "type-not-provisioned"
    ISSUER_UNKNOWN = "issuer-unknown"
    ISSUER_EXPIRED = "issuer-expired"
    ISSUER_DOES_NOT_PROVISION = "issuer-does-not-provision"
    CERTIFICATE_EXPIRED = "certificate-expired"
    CERTIFICATE_NOT_YET_VALID = "certificate-not-yet-valid"
    SIGNATURE_INVALID = "signature-invalid"
    SUBJECT_DIFFERS = "subject-differs"
    """The auth-id is another name than the certificate's subject."""
    SUBJECT_SPELLED_OTHERWISE = "subject-spelled-otherwise"
    """The auth-id is the subject of the certificate, or of a credential that is registered, in another spelling."""
    TEMPLATE_NOT_FILLED = "template-not-filled"
    DEVICE_ID_INVALID = "device-id-invalid"
    DEVICE_LIMIT_REACHED = "device-limit-reached"
    CREDENTIALS_LIMIT_REACHED = "credentials-limit-reached"
    DEVICE_ID_TAKEN = "device-id-taken"
    HOOK_REFUSED = "hook-refused"
    """The external system that has a say does not want the device."""
    HOOK_FAILED = "hook-failed"
    """It has given no answer, or none that can be used."""


class RegistryError(Exception):
    """An outcome other than success that is part of the registry's contract.

    Args:
        message: Text for whoever asked: names the member and the rule; no secrets, SQL or paths.
        reason: Why, for the log and the operator's tools only.
        details: Further members for the JSON error body (`subject-dn` of a trust anchor clash).
    """

    status = 500

    def __init__(self, message: str, *, reason: Reason | None = None, details: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.details = details


class BadRequest(RegistryError):
    """The request itself is wrong: malformed, a member missing or against its rule."""

    status = 400


class Unauthorized(RegistryError):
    """The caller did not say, or could not prove, who it is."""

    status = 401


class Forbidden(RegistryError):
    """The caller may not do this, or a limit is reached."""

    status = 403


class NotFound(RegistryError):
    """There is no such thing, or it is disabled."""

    status = 404


class Conflict(RegistryError):
    """Something else holds the id, alias, trust anchor or auth-id."""

    status = 409


class PreconditionFailed(RegistryError):
    """The resource has another version than the caller expects."""

    status = 412


class TooLarge(RegistryError):
    """The request exceeds a size limit."""

    status = 413


class NotSupported(RegistryError):
    """A variant that the interface knows and this registry does not offer (Hono Credentials API: by device-id)."""

    status = 501


class Unavailable(RegistryError):
    """Temporarily not possible (database, overload); the caller may retry."""

    status = 503


class OutcomeUnknown(Unavailable):
    """The change may have been made or not. Asking again is safe: what was made is found, in its new version."""
