from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from controlplane.domain.secrets import hash_secret
from postroad.config.v1 import bundle_pb2
from postroad.control.v1 import account_service_pb2, provider_service_pb2
from postroad.control.v1 import credential_pb2 as pb
from postroad.control.v1 import credential_service_pb2 as service
from support.api import ApiStack, Client, running_api
from support.databases import Database

UUID_1 = "11111111-1111-4111-8111-111111111111"


@pytest.fixture
async def stack(migrated_database: Database) -> AsyncIterator[ApiStack]:
    async with running_api(migrated_database) as running:
        yield running


def at(time: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(time)
    return stamp


def read_account(client: Client) -> object:
    return client.account("GetAccount", account_service_pb2.GetAccountRequest(name="accounts/acme"))


async def bundle_of(stack: ApiStack, account: str) -> bundle_pb2.AccountBundle:
    (row,) = await stack.as_superuser(
        "SELECT content FROM postroad.config_bundles WHERE bundle = $1", f"accounts/{account}"
    )
    return bundle_pb2.AccountBundle.FromString(row["content"])


async def test_a_key_is_shown_once_and_stored_as_a_hash(stack: ApiStack) -> None:
    client = await stack.make_account("acme")
    request = service.CreateApiKeyRequest(
        parent="accounts/acme", api_key_id="ci", api_key=pb.ApiKey(scopes=["config.read"]), request_id=UUID_1
    )
    made = await client.credential("CreateApiKey", request)
    assert made.name == "accounts/acme/apiKeys/ci"
    assert made.secret.startswith(made.prefix + "_")
    again = await client.credential("CreateApiKey", request)
    assert again.secret == ""
    assert again.uid == made.uid
    read = await client.credential("GetApiKey", service.GetApiKeyRequest(name=made.name))
    assert read.secret == ""
    (row,) = await stack.as_superuser("SELECT * FROM postroad.api_keys WHERE api_key = 'ci'")
    assert row["secret_sha256"] == hash_secret(made.secret)
    stored = await stack.as_superuser("SELECT response FROM postroad.idempotency")
    assert all(made.secret.encode() not in one["response"] for one in stored)


async def test_a_rehearsed_key_has_no_secret_and_is_not_there(stack: ApiStack) -> None:
    request = service.CreateApiKeyRequest(
        api_key_id="second", api_key=pb.ApiKey(scopes=["operator"]), validate_only=True
    )
    made = await stack.operator.credential("CreateApiKey", request)
    assert made.secret == ""
    assert await stack.as_superuser("SELECT 1 FROM postroad.api_keys WHERE api_key = 'second'") == []


async def test_a_key_cannot_grant_or_learn_what_its_maker_lacks(stack: ApiStack) -> None:
    strong = await stack.make_account("acme")
    weak = await stack.make_key("acme", "config.read", "config.write")
    request = service.CreateApiKeyRequest(
        parent="accounts/acme", api_key_id="more", api_key=pb.ApiKey(scopes=["messages.read"])
    )
    error = await weak.refused(weak.credential("CreateApiKey", request))
    assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, "SCOPE_MISSING")
    made = await strong.credential("CreateApiKey", request)
    rotate = service.RotateApiKeyRequest(name=made.name, etag=made.etag)
    error = await weak.refused(weak.credential("RotateApiKey", rotate))
    assert error.code is grpc.StatusCode.PERMISSION_DENIED
    operators = service.CreateApiKeyRequest(api_key_id="mine", api_key=pb.ApiKey(scopes=["operator"]))
    error = await strong.refused(strong.credential("CreateApiKey", operators))
    assert error.reason == "OPERATOR_ONLY"


@pytest.mark.parametrize(
    ("parent", "scopes"),
    [
        ("accounts/acme", []),
        ("accounts/acme", ["operator"]),
        ("accounts/acme", ["root"]),
        ("", ["config.read"]),
        ("", ["operator", "config.read"]),
    ],
)
async def test_scopes_fit_the_owner_of_the_key(stack: ApiStack, parent: str, scopes: list[str]) -> None:
    await stack.make_account("acme")
    request = service.CreateApiKeyRequest(parent=parent, api_key_id="bad", api_key=pb.ApiKey(scopes=scopes))
    error = await stack.operator.refused(stack.operator.credential("CreateApiKey", request))
    assert error.fields == ["api_key.scopes"]


async def test_rotating_ends_the_old_secret_at_once(stack: ApiStack) -> None:
    client = await stack.make_account("acme")
    (key,) = (await client.credential("ListApiKeys", service.ListApiKeysRequest(parent="accounts/acme"))).api_keys
    rotated = await client.credential("RotateApiKey", service.RotateApiKeyRequest(name=key.name, etag=key.etag))
    error = await client.refused(read_account(client))
    assert (error.code, error.reason) == (grpc.StatusCode.UNAUTHENTICATED, "API_KEY_INVALID")
    await read_account(Client(stack.channel, rotated.secret))  # type: ignore[misc]


async def test_a_revoked_key_is_refused_kept_and_cannot_be_rotated(stack: ApiStack) -> None:
    client = await stack.make_account("acme")
    (key,) = (await client.credential("ListApiKeys", service.ListApiKeysRequest(parent="accounts/acme"))).api_keys
    revoke = service.RevokeApiKeyRequest(name=key.name, etag=key.etag)
    revoked = await client.credential("RevokeApiKey", revoke)
    assert revoked.HasField("revoke_time")
    assert (await client.refused(read_account(client))).code is grpc.StatusCode.UNAUTHENTICATED
    rotate = service.RotateApiKeyRequest(name=key.name, etag=revoked.etag)
    error = await stack.operator.refused(stack.operator.credential("RotateApiKey", rotate))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "KEY_REVOKED")


async def test_an_expired_key_is_refused_and_one_cannot_be_born_expired(stack: ApiStack) -> None:
    client = await stack.make_account("acme")
    request = service.CreateApiKeyRequest(
        parent="accounts/acme",
        api_key_id="old",
        api_key=pb.ApiKey(scopes=["config.read"], expire_time=at(datetime.now(UTC) - timedelta(hours=1))),
    )
    error = await client.refused(client.credential("CreateApiKey", request))
    assert error.fields == ["api_key.expire_time"]
    await stack.as_superuser("UPDATE postroad.api_keys SET expire_time = now() - interval '1 s' WHERE account = 'acme'")
    assert (await client.refused(read_account(client))).code is grpc.StatusCode.UNAUTHENTICATED


async def test_last_use_is_kept_to_the_minute_and_is_no_edit(stack: ApiStack) -> None:
    client = await stack.make_account("acme")
    await read_account(client)  # type: ignore[misc]
    (first,) = await stack.as_superuser("SELECT last_use_time, version FROM postroad.api_keys WHERE account = 'acme'")
    assert first["last_use_time"] is not None
    await read_account(client)  # type: ignore[misc]
    (second,) = await stack.as_superuser("SELECT last_use_time, version FROM postroad.api_keys WHERE account = 'acme'")
    assert tuple(second) == tuple(first)
    assert first["version"] == 1


@pytest.mark.parametrize("code", ["40001", "57014", "25006"], ids=["race-lost", "too-slow", "read-only"])
async def test_a_key_whose_use_cannot_be_noted_is_good_all_the_same(stack: ApiStack, code: str) -> None:
    client = await stack.make_account("acme")
    await stack.as_superuser(
        "CREATE FUNCTION postroad.fail() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN RAISE EXCEPTION 'not now' USING ERRCODE = '{code}'; END $$"
    )
    await stack.as_superuser(
        "CREATE TRIGGER fail BEFORE UPDATE OF last_use_time ON postroad.api_keys"
        " FOR EACH ROW EXECUTE FUNCTION postroad.fail()"
    )
    assert (await read_account(client)).name == "accounts/acme"  # type: ignore[misc]
    used = "SELECT last_use_time FROM postroad.api_keys WHERE account = 'acme'"
    assert [row[0] for row in await stack.as_superuser(used)] == [None]

    await stack.as_superuser("DROP TRIGGER fail ON postroad.api_keys")
    await read_account(client)  # type: ignore[misc]
    assert None not in [row[0] for row in await stack.as_superuser(used)]


async def test_the_last_operators_key_cannot_go(stack: ApiStack) -> None:
    operator = stack.operator
    (key,) = (await operator.credential("ListApiKeys", service.ListApiKeysRequest())).api_keys
    delete = service.DeleteApiKeyRequest(name=key.name, etag=key.etag)
    for call in (
        operator.credential("DeleteApiKey", delete),
        operator.credential("RevokeApiKey", service.RevokeApiKeyRequest(name=key.name, etag=key.etag)),
    ):
        error = await operator.refused(call)
        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "LAST_OPERATOR_KEY")
    request = service.CreateApiKeyRequest(api_key_id="second", api_key=pb.ApiKey(scopes=["operator"]))
    second = Client(stack.channel, (await operator.credential("CreateApiKey", request)).secret)
    await second.credential("DeleteApiKey", delete)
    assert (await operator.refused(operator.credential("ListApiKeys", service.ListApiKeysRequest()))).code is (
        grpc.StatusCode.UNAUTHENTICATED
    )


async def test_an_smtp_credential_reaches_the_bundle_as_a_hash_only(stack: ApiStack) -> None:
    client = await stack.make_account("acme")
    request = service.CreateSmtpCredentialRequest(parent="accounts/acme", smtp_credential_id="app")
    made = await client.credential("CreateSmtpCredential", request)
    assert made.username == "acme.app"
    assert made.secret.startswith("prs_")
    (credential,) = (await bundle_of(stack, "acme")).credentials
    assert credential.name == "accounts/acme/smtpCredentials/app"
    assert credential.secret_sha256 == hash_secret(made.secret)
    (row,) = await stack.as_superuser("SELECT * FROM postroad.smtp_credentials")
    assert made.secret not in str(dict(row))
    rows = await stack.as_superuser("SELECT new_row::text AS text FROM postroad.audit_log")
    assert all("secret_sha256" not in one["text"] and "scram_salt" not in one["text"] for one in rows if one["text"])


async def test_rotating_an_smtp_credential_changes_the_bundle_and_denies_nothing(stack: ApiStack) -> None:
    client = await stack.make_account("acme")
    made = await client.credential(
        "CreateSmtpCredential",
        service.CreateSmtpCredentialRequest(parent="accounts/acme", smtp_credential_id="app"),
    )
    rotated = await client.credential(
        "RotateSmtpCredential", service.RotateSmtpCredentialRequest(name=made.name, etag=made.etag)
    )
    (credential,) = (await bundle_of(stack, "acme")).credentials
    assert credential.secret_sha256 == hash_secret(rotated.secret) != hash_secret(made.secret)
    assert await stack.as_superuser("SELECT 1 FROM postroad.denials") == []


@pytest.mark.parametrize("verb", ["RevokeSmtpCredential", "DeleteSmtpCredential"])
async def test_a_credential_that_goes_is_denied_to_every_node(stack: ApiStack, verb: str) -> None:
    client = await stack.make_account("acme")
    create = service.CreateSmtpCredentialRequest(parent="accounts/acme", smtp_credential_id="app")
    made = await client.credential("CreateSmtpCredential", create)
    await client.credential(verb, getattr(service, f"{verb}Request")(name=made.name, etag=made.etag))
    assert list((await bundle_of(stack, "acme")).credentials) == []
    (denial,) = await stack.as_superuser("SELECT * FROM postroad.denials")
    assert (denial["denial"], denial["kind"], denial["account"]) == (made.name, 2, "acme")
    assert denial["expire_time"] - denial["since_time"] == timedelta(days=31)
    if verb == "DeleteSmtpCredential":
        await client.credential("CreateSmtpCredential", create)
        assert await stack.as_superuser("SELECT 1 FROM postroad.denials") == []


async def deny(stack: ApiStack, account: str, first: int, last: int, days: int) -> None:
    await stack.as_superuser(
        """
        INSERT INTO postroad.denials (denial, kind, account, expire_time)
        SELECT 'accounts/' || $1::text || '/smtpCredentials/c' || n, 2, $1, now() + make_interval(days => $4)
        FROM generate_series($2::int, $3::int) AS n
        """,
        *(account, first, last, days),
    )


async def test_an_account_with_1000_denied_credentials_gets_no_new_one_until_a_denial_ends(stack: ApiStack) -> None:
    client = await stack.make_account("acme")
    await stack.make_account("other")
    create = service.CreateSmtpCredentialRequest(parent="accounts/acme", smtp_credential_id="app", request_id=UUID_1)
    await deny(stack, "acme", 1, 100, -1)
    await deny(stack, "acme", 101, 101, 5)
    await deny(stack, "acme", 102, 1_099, 20)
    made = await client.credential("CreateSmtpCredential", create)
    await client.credential("DeleteSmtpCredential", service.DeleteSmtpCredentialRequest(name=made.name, etag=made.etag))

    more = service.CreateSmtpCredentialRequest(parent="accounts/acme", smtp_credential_id="more")
    for refused in (client, stack.operator):
        error = await refused.refused(refused.credential("CreateSmtpCredential", more))
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_DENIED_CREDENTIALS")
        (quota,) = error.details["QuotaFailure"].violations
        assert "1,000 SMTP credentials of accounts/acme" in quota.description
        wait = error.details["RetryInfo"].retry_delay.ToTimedelta()
        assert timedelta(days=4, hours=23) < wait <= timedelta(days=5)
    assert await stack.as_superuser("SELECT 1 FROM postroad.smtp_credentials") == []
    assert (await client.credential("CreateSmtpCredential", create)).uid == made.uid  # the answer of the first call
    await stack.operator.credential(
        "CreateSmtpCredential",
        service.CreateSmtpCredentialRequest(parent="accounts/other", smtp_credential_id="app"),
    )

    await stack.as_superuser("UPDATE postroad.denials SET expire_time = now() WHERE denial LIKE '%/c101'")
    await client.credential("CreateSmtpCredential", more)


async def test_two_keys_in_one_call_are_refused(stack: ApiStack) -> None:
    client = await stack.make_account("acme")
    client.metadata = (*client.metadata, *stack.operator.metadata)
    request = provider_service_pb2.ListProvidersRequest(parent="accounts/acme")
    error = await client.refused(client.provider("ListProviders", request))
    assert (error.code, error.reason) == (grpc.StatusCode.UNAUTHENTICATED, "API_KEY_MISSING")


async def test_lists_of_credentials_have_pages(stack: ApiStack) -> None:
    client = await stack.make_account("acme")
    for name in "abc":
        request = service.CreateSmtpCredentialRequest(parent="accounts/acme", smtp_credential_id=name)
        await client.credential("CreateSmtpCredential", request)
    first = await client.credential(
        "ListSmtpCredentials", service.ListSmtpCredentialsRequest(parent="accounts/acme", page_size=2)
    )
    second = await client.credential(
        "ListSmtpCredentials",
        service.ListSmtpCredentialsRequest(parent="accounts/acme", page_token=first.next_page_token),
    )
    found = [*first.smtp_credentials, *second.smtp_credentials]
    assert [one.username for one in found] == ["acme.a", "acme.b", "acme.c"]
    await stack.make_account("other")
    foreign = service.ListSmtpCredentialsRequest(parent="accounts/other", page_token=first.next_page_token)
    error = await stack.operator.refused(stack.operator.credential("ListSmtpCredentials", foreign))
    assert error.reason == "PAGE_TOKEN_INVALID"
