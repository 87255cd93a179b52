"""CredentialService over gRPC: messages to values and back; see the proto for what each method promises.

A secret is written into the answer of the call that made it, never into the answer that is kept for its request id, and
not into that of a rehearsal, where it would open nothing.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.empty_pb2 import Empty

from controlplane.adapters.grpc import convert
from controlplane.adapters.grpc.context import caller
from controlplane.domain import names, secrets
from controlplane.domain.resources import ApiKey, SmtpCredential
from controlplane.services.credentials import ApiKeysService, SmtpCredentialsService
from postroad.control.v1 import credential_pb2 as pb
from postroad.control.v1 import credential_service_pb2 as service_pb
from postroad.control.v1 import credential_service_pb2_grpc as service_grpc


class CredentialHandlers(service_grpc.CredentialServiceServicer):
    """See the module."""

    def __init__(self, api_keys: ApiKeysService, smtp_credentials: SmtpCredentialsService) -> None:
        self._api_keys = api_keys
        self._smtp_credentials = smtp_credentials

    async def CreateApiKey(self, request: service_pb.CreateApiKeyRequest, context: Any) -> pb.ApiKey:
        """As the proto says."""
        mutation = convert.mutation("CreateApiKey", request, _write_key, validate_only=request.validate_only)
        sent = request.api_key
        key = ApiKey(
            account=names.parse_parent(request.parent),
            api_key=request.api_key_id,
            display_name=sent.display_name,
            scopes=tuple(sent.scopes),
            expire_time=convert.from_timestamp(sent, "expire_time", "api_key.expire_time"),
        )
        result = await self._api_keys.create(caller(), mutation, key)
        return convert.answer(result, pb.ApiKey, _write_key if request.validate_only else _write_new_key)

    async def GetApiKey(self, request: service_pb.GetApiKeyRequest, context: Any) -> pb.ApiKey:
        """As the proto says."""
        return _write_key(await self._api_keys.get(caller(), *_key_ids(request.name)))

    async def ListApiKeys(self, request: service_pb.ListApiKeysRequest, context: Any) -> service_pb.ListApiKeysResponse:
        """As the proto says."""
        account = names.parse_parent(request.parent)
        found, more = await self._api_keys.list_page(caller(), account, request.page_size, request.page_token)
        return service_pb.ListApiKeysResponse(api_keys=[_write_key(key) for key in found], next_page_token=more)

    async def DeleteApiKey(self, request: service_pb.DeleteApiKeyRequest, context: Any) -> Empty:
        """As the proto says."""
        mutation = convert.mutation("DeleteApiKey", request, convert.write_empty)
        await self._api_keys.delete(
            caller(), mutation, *_key_ids(request.name), request.etag, allow_missing=request.allow_missing
        )
        return Empty()

    async def RotateApiKey(self, request: service_pb.RotateApiKeyRequest, context: Any) -> pb.ApiKey:
        """As the proto says."""
        mutation = convert.mutation("RotateApiKey", request, _write_key)
        result = await self._api_keys.rotate(caller(), mutation, *_key_ids(request.name), request.etag)
        return convert.answer(result, pb.ApiKey, _write_new_key)

    async def RevokeApiKey(self, request: service_pb.RevokeApiKeyRequest, context: Any) -> pb.ApiKey:
        """As the proto says."""
        mutation = convert.mutation("RevokeApiKey", request, _write_key)
        result = await self._api_keys.revoke(caller(), mutation, *_key_ids(request.name), request.etag)
        return convert.answer(result, pb.ApiKey, _write_key)

    async def CreateSmtpCredential(
        self, request: service_pb.CreateSmtpCredentialRequest, context: Any
    ) -> pb.SmtpCredential:
        """As the proto says."""
        mutation = convert.mutation(
            "CreateSmtpCredential", request, _write_credential, validate_only=request.validate_only
        )
        sent = request.smtp_credential
        credential = SmtpCredential(
            account=names.parse_name(request.parent, names.ACCOUNT, "parent")[0],
            smtp_credential=request.smtp_credential_id,
            display_name=sent.display_name,
            expire_time=convert.from_timestamp(sent, "expire_time", "smtp_credential.expire_time"),
        )
        result = await self._smtp_credentials.create(caller(), mutation, credential)
        write = _write_credential if request.validate_only else _write_new_credential
        return convert.answer(result, pb.SmtpCredential, write)

    async def GetSmtpCredential(self, request: service_pb.GetSmtpCredentialRequest, context: Any) -> pb.SmtpCredential:
        """As the proto says."""
        return _write_credential(await self._smtp_credentials.get(caller(), *_credential_ids(request.name)))

    async def ListSmtpCredentials(
        self, request: service_pb.ListSmtpCredentialsRequest, context: Any
    ) -> service_pb.ListSmtpCredentialsResponse:
        """As the proto says."""
        account = names.parse_name(request.parent, names.ACCOUNT, "parent")[0]
        found, more = await self._smtp_credentials.list_page(caller(), account, request.page_size, request.page_token)
        return service_pb.ListSmtpCredentialsResponse(
            smtp_credentials=[_write_credential(credential) for credential in found], next_page_token=more
        )

    async def DeleteSmtpCredential(self, request: service_pb.DeleteSmtpCredentialRequest, context: Any) -> Empty:
        """As the proto says."""
        mutation = convert.mutation("DeleteSmtpCredential", request, convert.write_empty)
        await self._smtp_credentials.delete(
            caller(), mutation, *_credential_ids(request.name), request.etag, allow_missing=request.allow_missing
        )
        return Empty()

    async def RotateSmtpCredential(
        self, request: service_pb.RotateSmtpCredentialRequest, context: Any
    ) -> pb.SmtpCredential:
        """As the proto says."""
        mutation = convert.mutation("RotateSmtpCredential", request, _write_credential)
        ids = _credential_ids(request.name)
        result = await self._smtp_credentials.rotate(caller(), mutation, *ids, request.etag)
        return convert.answer(result, pb.SmtpCredential, _write_new_credential)

    async def RevokeSmtpCredential(
        self, request: service_pb.RevokeSmtpCredentialRequest, context: Any
    ) -> pb.SmtpCredential:
        """As the proto says."""
        mutation = convert.mutation("RevokeSmtpCredential", request, _write_credential)
        ids = _credential_ids(request.name)
        result = await self._smtp_credentials.revoke(caller(), mutation, *ids, request.etag)
        return convert.answer(result, pb.SmtpCredential, _write_credential)

    async def SuspendSmtpCredential(
        self, request: service_pb.SuspendSmtpCredentialRequest, context: Any
    ) -> pb.SmtpCredential:
        """As the proto says."""
        mutation = convert.mutation("SuspendSmtpCredential", request, _write_credential)
        ids = _credential_ids(request.name)
        result = await self._smtp_credentials.suspend(caller(), mutation, *ids, request.reason)
        return convert.answer(result, pb.SmtpCredential, _write_credential)

    async def ResumeSmtpCredential(
        self, request: service_pb.ResumeSmtpCredentialRequest, context: Any
    ) -> pb.SmtpCredential:
        """As the proto says."""
        mutation = convert.mutation("ResumeSmtpCredential", request, _write_credential)
        result = await self._smtp_credentials.resume(caller(), mutation, *_credential_ids(request.name))
        return convert.answer(result, pb.SmtpCredential, _write_credential)


def _key_ids(name: str) -> tuple[str | None, str]:
    return names.parse_owned(name, names.API_KEY, names.OPERATOR_KEY)


def _credential_ids(name: str) -> tuple[str, str]:
    account, credential = names.parse_name(name, names.SMTP_CREDENTIAL)
    return account, credential


def _write_key(key: ApiKey) -> pb.ApiKey:
    message = pb.ApiKey(
        name=names.api_key_name(key.account, key.api_key),
        display_name=key.display_name,
        scopes=key.scopes,
        prefix=secrets.api_key_prefix(key.lookup),
        expire_time=convert.to_timestamp(key.expire_time),
        revoke_time=convert.to_timestamp(key.revoke_time),
        last_use_time=convert.to_timestamp(key.last_use_time),
    )
    convert.write_meta(message, key.meta)
    return message


def _write_new_key(key: ApiKey) -> pb.ApiKey:
    message = _write_key(key)
    message.secret = key.secret
    return message


def _write_credential(credential: SmtpCredential) -> pb.SmtpCredential:
    message = pb.SmtpCredential(
        name=names.format_name(names.SMTP_CREDENTIAL, credential.account, credential.smtp_credential),
        display_name=credential.display_name,
        username=f"{credential.account}.{credential.smtp_credential}",
        expire_time=convert.to_timestamp(credential.expire_time),
        revoke_time=convert.to_timestamp(credential.revoke_time),
        suspend_time=convert.to_timestamp(credential.suspend_time),
        suspend_reason=credential.suspend_reason,
    )
    convert.write_meta(message, credential.meta)
    return message


def _write_new_credential(credential: SmtpCredential) -> pb.SmtpCredential:
    message = _write_credential(credential)
    message.secret = credential.secret
    return message
