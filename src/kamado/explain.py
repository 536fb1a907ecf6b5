"""Why a look-up was refused, in words for the operator: `kamado explain`.

Adapters and devices never see a reason, since it would help somebody who guesses. Here the same look-up is made on the
same database, with every right, and nothing is stored: what provisioning would write is undone.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import TypeVar

from kamado.auth import LOCAL_OPERATOR
from kamado.document import decode
from kamado.errors import NotFound, Reason, RegistryError, Unavailable
from kamado.lookup import Answer, LookupService
from kamado.provisioning import HookQuestion, HookReply
from kamado.store import DeviceKey, Lookups, Searches, Store, Transaction, Work

__all__ = ["SENTENCES", "DryRunHook", "DryRunStore", "Explainer", "Explanation"]

T = TypeVar("T")

SENTENCES: dict[Reason, str] = {
    Reason.MALFORMED_REQUEST: "The request lacks something or is written wrongly.",
    Reason.NO_RIGHT: "The caller's role does not allow this. See: kamado identity list",
    Reason.TENANT_UNKNOWN: "There is no tenant of this id or alias.",
    Reason.TENANT_DISABLED: "The tenant's `enabled` is false.",
    Reason.ISSUER_AMBIGUOUS: "Several tenants of one trust anchor group trust this CA, so the CA alone names no "
    "tenant; an adapter asks again with the host name that the device used (SNI).",
    Reason.DEVICE_UNKNOWN: "The tenant has no device of this id.",
    Reason.DEVICE_DISABLED: "The device is registered, but its `enabled` is false.",
    Reason.GATEWAY_UNKNOWN: "The tenant has no device of the gateway's id.",
    Reason.GATEWAY_DISABLED: "The gateway is registered, but its `enabled` is false.",
    Reason.GATEWAY_NOT_AUTHORIZED: "The gateway may not act for the device: it is not in the device's `via`, and none "
    "of its `memberOf` is in the device's `viaGroups`.",
    Reason.DEVICE_AND_GATEWAY_UNKNOWN: "The tenant has no device of this id, and none of the gateway's id that could "
    "provision it.",
    Reason.DEVICE_UNKNOWN_GATEWAY_DISABLED: "The tenant has no device of this id, and the gateway cannot provision it: "
    "its `enabled` is false.",
    Reason.GATEWAY_MAY_NOT_PROVISION: "The tenant has no device of this id, and the gateway may not provision it: its "
    "`authorities` do not contain `auto-provisioning-enabled`.",
    Reason.EDGE_DEVICE_ID_INVALID: "The gateway may provision the device, but the device's id breaks the rule for "
    "device ids.",
    Reason.CREDENTIAL_UNKNOWN: "No device of the tenant has credentials of this type and auth-id. The auth-id "
    "must be equal letter by letter.",
    Reason.CREDENTIAL_DISABLED: "The credentials are there, but their `enabled` is false.",
    Reason.CONTEXT_MISMATCH: "The credentials' `ext` names a member of the client context with another value.",
    Reason.SECRETS_DISABLED: "The credentials are there, but each secret's `enabled` is false.",
    Reason.SECRETS_EXPIRED: "The credentials are there, but each secret's `not-after` is over.",
    Reason.SECRETS_NOT_YET_VALID: "The credentials are there, but no secret's `not-before` has come yet.",
    Reason.SEARCH_BY_DEVICE_ID: "Credentials are found by type and auth-id, not by device id.",
    Reason.NO_CERTIFICATE: "No device of the tenant has credentials of this type and auth-id, and the adapter sent no "
    "certificate, so the device cannot be provisioned either.",
    Reason.CERTIFICATE_UNREADABLE: "What the adapter sent as `client-certificate` is no X.509 certificate in Base64.",
    Reason.TYPE_NOT_PROVISIONED: "Only devices with credentials of type x509-cert are provisioned.",
    Reason.ISSUER_UNKNOWN: "The tenant trusts no CA of the name that issued the certificate (`trusted-ca`).",
    Reason.ISSUER_EXPIRED: "The tenant trusts the CA that issued the certificate, but not now: outside of its "
    "`not-before` and `not-after`.",
    Reason.ISSUER_DOES_NOT_PROVISION: "The tenant trusts the CA, but the CA's `auto-provisioning-enabled` is not true.",
    Reason.CERTIFICATE_EXPIRED: "The device's certificate has expired.",
    Reason.CERTIFICATE_NOT_YET_VALID: "The device's certificate is not valid yet. Is the clock right?",
    Reason.SIGNATURE_INVALID: "The certificate names a trusted CA as its issuer, but that CA's key did not sign it.",
    Reason.SUBJECT_DIFFERS: "The auth-id is another name than the certificate's subject.",
    Reason.SUBJECT_SPELLED_OTHERWISE: "The auth-id is the subject of the certificate, or of credentials that "
    "are registered, but spelled otherwise; it must be equal letter by letter.",
    Reason.TEMPLATE_NOT_FILLED: "The CA's ID template asks for something that the certificate's subject does not have.",
    Reason.DEVICE_ID_INVALID: "The device id that the CA's template makes breaks the rule for device ids.",
    Reason.DEVICE_LIMIT_REACHED: "The tenant has as many devices as it may.",
    Reason.CREDENTIALS_LIMIT_REACHED: "The device would have more credentials than the tenant allows.",
    Reason.DEVICE_ID_TAKEN: "A device of this id is registered already, with other credentials.",
    Reason.HOOK_REFUSED: "The external system that is asked about new devices (`provisioning.hook`) does not want this "
    "one.",
    Reason.HOOK_FAILED: "The external system that is asked about new devices (`provisioning.hook`) has not answered in "
    "time, or not as it should; the log has a warning that says more.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What an adapter would get, and why."""

    status: int
    text: str
    """A sentence or two, for a person."""
    reason: Reason | None = None
    """`None` for success."""
    message: str | None = None
    """What the error says beyond its reason."""

    @classmethod
    def of_error(cls, error: RegistryError) -> "Explanation":
        """Explain a refusal."""
        message = str(error)
        match error.reason:
            case None:
                text = message
            case Reason.MALFORMED_REQUEST:
                text = f"{SENTENCES[error.reason].removesuffix('.')}: {message}"
            case _:
                text = SENTENCES[error.reason]
        return cls(status=error.status, reason=error.reason, text=text, message=message)

    @property
    def headline(self) -> str:
        """Status and reason in one line."""
        return f"{self.status} {HTTPStatus(self.status).phrase}" + (f": {self.reason}" if self.reason else "")

    def as_json(self) -> dict[str, object]:
        """For scripts."""
        return {"status": self.status, "reason": self.reason, "text": self.text, "message": self.message}


class Explainer:
    """Makes look-ups with every right, and says what came of them.

    Args:
        lookup: Built on a `DryRunStore` and, where an external system has a say, the hook.
        hook: That one; `None` where nobody is asked.
    """

    def __init__(self, lookup: LookupService, hook: "DryRunHook | None" = None) -> None:
        self._lookup = lookup
        self._hook = hook

    async def explain_tenant(self, body: bytes) -> Explanation:
        """Explain a request of the Tenant API (amqp-apis 9).

        Raises:
            Unavailable: The database cannot be read.
        """
        try:
            answer = await self._lookup.get_tenant_by_body(LOCAL_OPERATOR, body)
        except RegistryError as error:
            refusal = _refused(error)
            if refusal.reason is Reason.ISSUER_UNKNOWN:
                # The sentence is about a certificate, and here is none.
                return replace(refusal, text="No tenant trusts a CA of this name (`trusted-ca`).")
            return refusal
        tenant_id = str(_member(answer, "tenant-id"))
        return await self._found(answer, tenant_id, f"This is tenant {tenant_id}.")

    async def explain_assert(self, tenant_id: str, device_id: str, gateway_id: str | None) -> Explanation:
        """Explain a request of the Device Registration API (amqp-apis 10).

        Raises:
            Unavailable: The database cannot be read.
        """
        try:
            answer = await self._lookup.assert_registration(LOCAL_OPERATOR, tenant_id, device_id, gateway_id)
        except RegistryError as error:
            return _refused(error)
        text = "The device may send."
        if gateway_id is not None:
            text = f"The device may send through {gateway_id}."
            try:
                await self._lookup.assert_registration(LOCAL_OPERATOR, tenant_id, device_id, None)
            except NotFound:
                text = f"The device would be provisioned by this request, behind {gateway_id}. Nothing was stored now."
                text += self._on_hook()
        return await self._found(answer, tenant_id, text)

    async def explain_credentials(self, tenant_id: str, body: bytes) -> Explanation:
        """Explain a request of the Credentials API (amqp-apis 11).

        Raises:
            Unavailable: The database cannot be read, or written for a trial.
        """
        try:
            answer = await self._lookup.get_credentials(LOCAL_OPERATOR, tenant_id, body)
        except RegistryError as error:
            return _refused(error)
        device_id = str(_member(answer, "device-id"))
        if answer.status == 201:
            text = f"The device would be provisioned by this request, as {device_id}. Nothing was stored now."
            text += self._on_hook()
            return await self._found(answer, tenant_id, text)
        text = f"These are credentials of device {device_id}; the adapter compares what the device presents."
        try:
            await self._lookup.assert_registration(LOCAL_OPERATOR, tenant_id, device_id, None)
        except RegistryError as error:
            refusal = _refused(error)
            text += f" But the device is turned away afterwards, {refusal.reason}: {refusal.text}"
        return await self._found(answer, tenant_id, text)

    def _on_hook(self) -> str:
        if self._hook is None or not self._hook.was_asked:
            return ""
        return (
            " Before that, the external system of `provisioning.hook` would be asked whether the device is wanted; it "
            "was not asked now."
        )

    async def _found(self, answer: Answer, tenant_id: str, text: str) -> Explanation:
        """An adapter looks at the tenant, too, whatever it asks for."""
        tenant = await self._lookup.get_tenant(LOCAL_OPERATOR, tenant_id)
        if _member(tenant, "enabled") is False:
            reason = Reason.TENANT_DISABLED
            text += f" But adapters turn away all its devices, {reason}: {SENTENCES[reason]}"
        return Explanation(status=answer.status, text=text)


def _refused(error: RegistryError) -> Explanation:
    if isinstance(error, Unavailable):
        raise error
    return Explanation.of_error(error)


def _member(answer: Answer, name: str) -> object:
    document = decode(answer.payload)
    return document.get(name) if isinstance(document, dict) else None


class _Undo(RegistryError):
    """Carries a result out of a transaction that is to leave nothing behind."""

    def __init__(self, result: object) -> None:
        super().__init__("undone")
        self.result = result


class DryRunHook:
    """A `ProvisioningHook` that asks nobody and wants every device."""

    def __init__(self) -> None:
        self.was_asked = False

    async def ask(self, question: HookQuestion) -> HookReply:
        """Take note of the question."""
        self.was_asked = True
        return HookReply(is_wanted=True)


class DryRunStore:
    """A `Store` whose writes are tried and undone.

    Args:
        store: The real one; closing stays its owner's business.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    @property
    def lookups(self) -> Lookups:
        """The real store's."""
        return self._store.lookups

    async def read(self, work: Work[T]) -> T:
        """Read."""
        return await self._store.read(work)

    async def write(self, work: Work[T], *, device: DeviceKey | None = None, tenant_id: str | None = None) -> T:
        """Run a use case and undo it."""

        async def try_work(transaction: Transaction) -> T:
            result = await work(transaction)
            raise _Undo(result)

        try:
            return await self._store.write(try_work)
        except _Undo as undone:
            result: T = undone.result  # type: ignore[assignment]  # what `work` returned
            return result

    @property
    def waiting_writes(self) -> int:
        """Those of the real store."""
        return self._store.waiting_writes

    async def search(self, work: Callable[[Searches], Awaitable[T]], *, is_heavy: bool = False) -> T:
        """Search."""
        return await self._store.search(work, is_heavy=is_heavy)

    async def ping(self) -> None:
        """Ask the real store."""
        await self._store.ping()

    async def close(self) -> None:
        """Do nothing."""
