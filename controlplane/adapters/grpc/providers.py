"""ProviderService over gRPC: messages to values and back; see the proto for what each method promises."""

from __future__ import annotations

from typing import Any

from google.protobuf.empty_pb2 import Empty

from controlplane.adapters.grpc import convert
from controlplane.adapters.grpc.context import caller
from controlplane.domain import names
from controlplane.domain.errors import invalid
from controlplane.domain.resources import PROVIDER_FIELDS, Provider, SmtpSettings
from controlplane.services.providers import ProvidersService
from dataplane.core.config import Endpoint, TlsPolicy
from postroad.control.v1 import provider_pb2 as pb
from postroad.control.v1 import provider_service_pb2 as service_pb
from postroad.control.v1 import provider_service_pb2_grpc as service_grpc

_POLICIES = frozenset(policy.value for policy in TlsPolicy)


class ProviderHandlers(service_grpc.ProviderServiceServicer):
    """See the module."""

    def __init__(self, providers: ProvidersService) -> None:
        self._providers = providers

    async def CreateProvider(self, request: service_pb.CreateProviderRequest, context: Any) -> pb.Provider:
        """As the proto says."""
        mutation = convert.mutation("CreateProvider", request, write_provider, validate_only=request.validate_only)
        if not request.provider.HasField("smtp"):
            raise invalid("provider.smtp", "is required: it is the only kind")
        value = _read(request.provider, names.parse_parent(request.parent), request.provider_id)
        return convert.answer(await self._providers.create(caller(), mutation, value), pb.Provider, write_provider)

    async def GetProvider(self, request: service_pb.GetProviderRequest, context: Any) -> pb.Provider:
        """As the proto says."""
        return write_provider(await self._providers.get(caller(), *_ids(request.name)))

    async def ListProviders(
        self, request: service_pb.ListProvidersRequest, context: Any
    ) -> service_pb.ListProvidersResponse:
        """As the proto says."""
        account = names.parse_parent(request.parent)
        found, more = await self._providers.list_page(caller(), account, request.page_size, request.page_token)
        return service_pb.ListProvidersResponse(
            providers=[write_provider(provider) for provider in found], next_page_token=more
        )

    async def UpdateProvider(self, request: service_pb.UpdateProviderRequest, context: Any) -> pb.Provider:
        """As the proto says."""
        mutation = convert.mutation("UpdateProvider", request, write_provider, validate_only=request.validate_only)
        sent = _read(request.provider, *_ids(request.provider.name, "provider.name"))
        patch = convert.patch_of(request.provider, request, PROVIDER_FIELDS)
        result = await self._providers.update(caller(), mutation, sent, patch)
        return convert.answer(result, pb.Provider, write_provider)

    async def DeleteProvider(self, request: service_pb.DeleteProviderRequest, context: Any) -> Empty:
        """As the proto says."""
        mutation = convert.mutation("DeleteProvider", request, convert.write_empty)
        await self._providers.delete(
            caller(), mutation, *_ids(request.name), request.etag, allow_missing=request.allow_missing
        )
        return Empty()

    async def SuspendProvider(self, request: service_pb.SuspendProviderRequest, context: Any) -> pb.Provider:
        """As the proto says."""
        mutation = convert.mutation("SuspendProvider", request, write_provider)
        result = await self._providers.suspend(caller(), mutation, *_ids(request.name), request.reason)
        return convert.answer(result, pb.Provider, write_provider)

    async def ResumeProvider(self, request: service_pb.ResumeProviderRequest, context: Any) -> pb.Provider:
        """As the proto says."""
        mutation = convert.mutation("ResumeProvider", request, write_provider)
        result = await self._providers.resume(caller(), mutation, *_ids(request.name))
        return convert.answer(result, pb.Provider, write_provider)

    async def VerifyProvider(
        self, request: service_pb.VerifyProviderRequest, context: Any
    ) -> service_pb.VerifyProviderResponse:
        """As the proto says."""
        result = await self._providers.verify(caller(), *_ids(request.name))
        return service_pb.VerifyProviderResponse(ok=result.ok, detail=result.detail, tls_version=result.tls_version)


def _ids(name: str, field: str = "name") -> tuple[str | None, str]:
    return names.parse_owned(name, names.PROVIDER, names.SHARED_PROVIDER, field)


def _read(message: pb.Provider, account: str | None, provider: str) -> Provider:
    smtp = message.smtp
    if smtp.tls_policy and int(smtp.tls_policy) not in _POLICIES:
        raise invalid("provider.smtp.tls_policy", "is not known")
    return Provider(
        account=account,
        provider=provider,
        display_name=message.display_name,
        smtp=SmtpSettings(
            endpoints=tuple(Endpoint(one.host, one.port, one.implicit_tls) for one in smtp.endpoints),
            tls_policy=TlsPolicy(smtp.tls_policy) if smtp.tls_policy else None,
            ca_pem=smtp.ca_pem,
            username=smtp.username,
            password=smtp.password,
            max_connections=smtp.max_connections,
            max_messages_per_connection=smtp.max_messages_per_connection,
        ),
    )


def write_provider(provider: Provider) -> pb.Provider:
    """Return the message of a provider; its password is never in it."""
    smtp = provider.smtp
    endpoint = pb.SmtpProvider.Endpoint
    message = pb.Provider(
        name=names.provider_name(provider.account, provider.provider),
        display_name=provider.display_name,
        state=pb.Provider.State.ValueType(provider.state),
        suspend_reason=provider.suspend_reason,
        smtp=pb.SmtpProvider(
            endpoints=[endpoint(host=one.host, port=one.port, implicit_tls=one.implicit_tls) for one in smtp.endpoints],
            tls_policy=pb.SmtpProvider.TlsPolicy.ValueType(smtp.tls_policy or 0),
            ca_pem=smtp.ca_pem,
            username=smtp.username,
            password_set=smtp.password_sealed is not None,
            max_connections=smtp.max_connections,
            max_messages_per_connection=smtp.max_messages_per_connection,
        ),
    )
    convert.write_meta(message, provider.meta)
    return message
