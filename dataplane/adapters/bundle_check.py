"""The agent's verdict on bundles: readable, valid, and with secrets that open. Fills `agent.ports.CheckBundles`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from dataplane.adapters.bundle_codec import check_bundle, decode_account, decode_shared_providers
from dataplane.adapters.sealing import KeyRing, SealError
from dataplane.agent.held import Proposal
from dataplane.core.config import Problem, SmtpProvider, seal_context
from postroad.config.v1.bundle_pb2 import BUNDLE_KIND_ACCOUNT, BUNDLE_KIND_SHARED_PROVIDERS, Bundle

_SHOWN = 5


def check_bundles(proposal: Proposal) -> Mapping[str, str]:
    """Return why, by the name of each changed bundle that must be refused. Never raises on content."""
    try:
        keys = KeyRing({key_id: key.key for key_id, key in proposal.pool_keys.items()})
    except SealError as error:
        return {bundle.name: f"a pool key cannot be used: {error}" for bundle in proposal.changed}
    errors = {}
    for bundle in proposal.changed:
        problems = check_bundle(bundle) or list(_sealed_problems(bundle, keys))
        if problems:
            errors[bundle.name] = _explain(problems)
    return errors


def _sealed_problems(bundle: Bundle, keys: KeyRing) -> Iterator[Problem]:
    providers: Iterable[SmtpProvider] = ()
    if bundle.kind == BUNDLE_KIND_ACCOUNT:
        providers = decode_account(bundle).providers.values()
    elif bundle.kind == BUNDLE_KIND_SHARED_PROVIDERS:
        providers = decode_shared_providers(bundle).values()
    for provider in providers:
        if provider.password is not None:
            try:
                keys.unseal(provider.password, seal_context(provider.account, provider.name, "password"))
            except KeyError:
                yield Problem(f'providers["{provider.name}"].password', "is sealed under a key that was not sent")
            except SealError:
                yield Problem(f'providers["{provider.name}"].password', "does not open here")


def _explain(problems: list[Problem]) -> str:
    told = [f"{problem.field}: {problem.description}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        told.append(f"and {len(problems) - _SHOWN} more")
    return "; ".join(told)
